# SPDX-License-Identifier: Apache-2.0
"""Run configurations: every file loads, flags override, and errors say what to change."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from few import slow
from qwen2_jax.data.spec import Source
from qwen2_jax.errors import UserError
from qwen2_jax.train import Lora, Mesh, Muon, Optim, Pretrain, Sft, Start, config_file

ROOT = Path(__file__).parents[2]
FILES = [f for f in sorted((ROOT / "configs").rglob("*.py")) if "config = " in f.read_text("utf-8")]
FINETUNE = ROOT / "configs" / "finetune.py"


@functools.cache
def finetune():
    return config_file.load(FINETUNE)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_every_config_loads_and_says_its_command(file):
    assert isinstance(config_file.load(file), config_file.Recipe)
    assert (
        f"python train.py {file.relative_to(ROOT).as_posix()}"
        in config_file.load.__globals__["runpy"].run_path(str(file))["__doc__"]
    )


def test_flags_override_and_nothing_else_changes():
    plain = config_file.load(FINETUNE)
    flags = "--optim.lr 1e-3 --rows 2 --start.checkpoint other --no-resume --checkpoints.every-steps 7 --ema 0.9"
    changed = config_file.load(FINETUNE, flags.split())
    assert (changed.optim.lr, changed.rows, changed.start.checkpoint, changed.resume) == (1e-3, 2, "other", False)
    assert (changed.checkpoints.every_steps, changed.ema) == (7, 0.9)
    same = {"optim": plain.optim, "rows": plain.rows, "start": plain.start, "checkpoints": plain.checkpoints}
    assert dataclasses.replace(changed, **same, resume=True, ema=None) == plain


def test_sources_are_words_on_the_command_line():
    run = config_file.load(
        FINETUNE, ["--data.sources", "a.jsonl,weight=0.7", "b/,weight=0.3,max_tokens=9,format=sharegpt"]
    )
    assert run.data.sources == (
        Source(path="a.jsonl", weight=0.7),
        Source(path="b/", weight=0.3, max_tokens=9, format="sharegpt"),
    )


def test_the_report_s_sft_numbers_are_the_defaults():
    run = Sft(start=Start(checkpoint="x"), data=config_file.load(FINETUNE).data, rows=8)
    assert (run.epochs, run.length, run.optim.decay, run.optim.clip) == (2, 32768, 0.1, 1.0)
    assert (run.optim.lr, run.optim.lr * run.optim.final) == pytest.approx((7e-6, 7e-7))
    assert dataclasses.replace(run, steps=5).epochs is None  # steps replaces a default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": None}, "either model .* or start"),
        ({"steps": 5}, "either steps or epochs"),
        ({"rows": 3, "accumulate": 2}, "rows=3 cannot be cut into accumulate=2"),
        ({"ema": 1.0}, "a decay is below 1"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"length": 1}, "length is 1"),
        (
            {"lora": Lora(), "dtype": "float32"},
            "with lora_base 'bfloat16' activations are bfloat16",
        ),
    ],
)
def test_contradictions_are_named(changes, message):
    base = {f.name: getattr(finetune(), f.name) for f in dataclasses.fields(Pretrain)}
    with pytest.raises(UserError, match=message):
        Pretrain(**base | changes)


def test_optimizer_and_mesh_values_are_checked():
    with pytest.raises(UserError, match="schedule"):
        Optim(lr=1.0, schedule="step")
    with pytest.raises(UserError, match="lr"):
        Optim(lr=-1.0)
    with pytest.raises(UserError, match="optim.b2 is 1.0; a decay is below 1"):
        Optim(lr=1.0, b2=1.0)
    with pytest.raises(UserError, match="muon: lr is -1.0"):
        Muon(lr=-1.0)
    for field, value in {"rows": 10**12, "accumulate": 10**7, "steps": 10**10}.items():
        with pytest.raises(UserError, match=f"{field} is {value}; .* at most 1,000,000"):
            dataclasses.replace(config_file.load(FINETUNE), epochs=None, **{"steps": 1, field: value})
    with pytest.raises(UserError, match="at most one axis"):
        Mesh(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="tensor=3.* is for a multiple of 3 devices, and 8 are here"):
        Mesh(tensor=3).sizes(8)
    assert Mesh(tensor=2).sizes(8) == {
        "replica": 1, "data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "defines no run"),
        ("config = (", "x.py: .*was never closed"),
        ("from qwen2_jax.train import Sfd", "x.py line 1: cannot import name 'Sfd'"),
        ("from qwen2_jax.train import Optim\nOptim(lr=1, shedule='wsd')", "x.py line 2: .*'shedule'"),
        ("import json\njson.loads('{')", "x.py line 2: JSONDecodeError: Expecting property name"),
        ("1 / 0", "x.py line 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_without_a_run_is_refused(tmp_path, text, message):
    file = tmp_path / "x.py"
    file.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        config_file.load(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python train.py"),
        (["--steps", "3"], "the first argument must be a config file"),
        (["configs/finetune.py", "--optim.lrr", "1"], "--optim.lr"),
        *slow(
            (["configs/nothing.py"], "no config file 'configs/nothing.py'"),
            (["configs/finetune.py", "--data.sources", "nowhere.jsonl"], "nowhere.jsonl"),
        ),
    ],
)
def test_command_line_mistakes_exit_with_2(arguments, message, tmp_path):
    out = ["--out", str(tmp_path / "out")] if len(arguments) > 1 and arguments[0].startswith("configs") else []
    command = [sys.executable, "train.py", *arguments, *out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
