# SPDX-License-Identifier: Apache-2.0
"""The numbers in the docstrings of configs/ are those of a fresh plan: `pytest -m slow tests/plan`."""

import ast
import re
from pathlib import Path

import pytest

from ahead_of_time import GPU_COMPILER, TPU_COMPILER
from qwen2_jax.chips import CHIPS
from qwen2_jax.plan import train
from qwen2_jax.plan.machine import parse
from qwen2_jax.plan.report import GIB
from qwen2_jax.train import config

CONFIGS = Path(__file__).parents[2] / "configs"
LINE = re.compile(r"--plan (\S+): ([\d.]+) GiB per device, ([\d.]+) to ([\d.]+) s")


def stated():
    """(file, machine, GiB per device, seconds where everything overlaps, where nothing does) of every docstring."""
    found = []
    for file in sorted(CONFIGS.glob("*.py")):
        text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
        for machine, *numbers in LINE.findall(text):
            marks = TPU_COMPILER if parse(machine).chip.is_tpu else GPU_COMPILER
            found.append(pytest.param(file, machine, *map(float, numbers), marks=marks, id=f"{file.stem}-{machine}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("file", "machine", "gib", "hidden", "exposed"), stated())
def test_a_docstring_has_the_numbers_of_its_plan(file, machine, gib, hidden, exposed):
    plan = train.plan(config.load(file), machine, file)
    assert plan.fits
    assert plan.needed / GIB == pytest.approx(gib, rel=0.02)
    (part,) = plan.parts
    assert (part.seconds.hidden, part.seconds.exposed) == pytest.approx((hidden, exposed), rel=0.02)


def test_docstrings_state_plans():
    planned = {param.values[0].stem for param in stated()}
    assert planned >= {"pretrain_0p5b", "pretrain_7b", "pretrain_72b"}
    assert {parse(param.values[1]).chip.name for param in stated()} <= set(CHIPS)
