# SPDX-License-Identifier: Apache-2.0
"""What is written of the full-size plans is what a fresh plan says: configs' docstrings, docs/scaling.md, the record.

Where the compilers are, the smallest job is compiled by `pytest`, the others by `-m slow`; `.ci/run` compiles the
former, and of the latter those that it has time for.
"""

import ast
import re

import pytest

import full_size
from ahead_of_time import GPU_COMPILER, TPU_COMPILER
from full_size import JOBS, ROOT
from qwen2_jax.plan.machine import parse

LINE = re.compile(r"--plan (\S+): ([\d.]+) GiB per device, ([\d.]+) to ([\d.]+) s a step")
TRAINING = [job for job in JOBS if job.trains and not job.flags]


def compiled(job):
    slow = () if job.quick else (pytest.mark.slow,)
    compiler = TPU_COMPILER if parse(job.machine).chip.is_tpu else GPU_COMPILER
    marks = [*(compiler if isinstance(compiler, list | tuple) else [compiler]), *slow]
    return pytest.param(job, marks=marks, id=job.name)


@pytest.mark.parametrize("job", [compiled(job) for job in JOBS])
def test_a_fresh_plan_is_the_recorded_one(job):
    got, want = full_size.recorded(full_size.plan(job)), full_size.kept()[job.name]
    assert got["fits"]
    assert got["mesh"] == want["mesh"]
    assert got["gib"] == pytest.approx(want["gib"], rel=0.02)
    for now, then in zip(got["programs"], want["programs"], strict=True):
        assert now["seconds"] == pytest.approx(then["seconds"], rel=0.02)
        assert now["collectives"] == pytest.approx(then["collectives"], rel=0.02)


def test_all_jobs_are_recorded_and_fit():
    kept = full_size.kept()
    assert list(kept) == [job.name for job in JOBS]
    assert all(one["fits"] for one in kept.values())


@pytest.mark.parametrize("job", TRAINING, ids=lambda job: job.name)
def test_a_docstring_has_the_numbers_of_its_plan(job):
    text = " ".join((ast.get_docstring(ast.parse((ROOT / f"configs/{job.what}.py").read_text())) or "").split())
    stated = {machine: [float(n) for n in numbers] for machine, *numbers in LINE.findall(text)}
    one = full_size.kept()[job.name]
    assert stated[job.machine] == pytest.approx([one["gib"], *one["programs"][0]["seconds"]], rel=0.01)


def test_the_tables_of_the_docs_are_those_of_the_record():
    assert full_size.tables() in (ROOT / "docs/scaling.md").read_text()


def test_every_parameter_lies_where_it_did():
    assert full_size.shardings() == full_size.SHARDINGS.read_text()
