# SPDX-License-Identifier: Apache-2.0
"""Run configurations: files, flags, and errors a user can act on."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.train import Shares, config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.py"


def test_demo_loads_and_flags_override():
    plain = config.load(DEMO)
    assert plain.total_steps == sum(s.steps for s in plain.data.stages)
    changed = config.load(DEMO, ["--optim.lr", "1e-3", "--steps", "100", "--model.hidden-size", "128", "--no-resume"])
    assert (changed.optim.lr, changed.total_steps, changed.model.hidden_size) == (1e-3, 100, 128)
    assert changed.resume is False
    assert dataclasses.replace(changed, optim=plain.optim, steps=None, model=plain.model, resume=True) == plain
    assert hash(plain) == hash(config.load(DEMO))


def test_docstring_says_command_hardware_and_result():
    doc = config.load.__globals__["runpy"].run_path(str(DEMO))["__doc__"]
    assert "python train.py configs/demo.py" in doc
    assert "two CPU cores" in doc
    assert "%" in doc


def test_stages_follow_each_other():
    plain = config.load(DEMO)
    first, second = plain.data.stages[:2]
    assert plain.stage(0) == plain.stage(first.steps - 1) == first
    assert plain.stage(first.steps) == second
    with pytest.raises(IndexError):
        plain.stage(plain.total_steps)


def test_bad_values_name_the_field():
    plain = config.load(DEMO)
    with pytest.raises(UserError, match="steps"):
        dataclasses.replace(plain, steps=10**9)
    with pytest.raises(UserError, match="max_position_embeddings"):
        dataclasses.replace(plain, model=dataclasses.replace(plain.model, max_position_embeddings=64))
    with pytest.raises(UserError, match="shares are all 0"):
        Shares()
    with pytest.raises(UserError, match="lr"):
        dataclasses.replace(plain.optim, lr=-1.0)


def test_a_file_without_a_run_is_refused(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("config = 3\n")
    with pytest.raises(UserError, match="defines no run"):
        config.load(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python train.py"),
        (["--steps", "3"], "the first argument must be a config file"),
        (["configs/nothing.py"], "no config file 'configs/nothing.py'"),
        (["configs/demo.py", "--optim.lrr", "1"], "--optim.lr"),
    ],
)
def test_command_line_mistakes_exit_with_2(arguments, message):
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
