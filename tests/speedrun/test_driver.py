# SPDX-License-Identifier: Apache-2.0
"""The speedrun's one command: what it would run, and (slow) two steps of each stage after fine-tuning."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AFTER = ("reward", "dpo", "online_dpo", "grpo")


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("speedrun_driver", ROOT / "configs/speedrun/run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def planned(driver, *names):
    """[(what is made, its command's words after the interpreter)] of some stages."""
    stages = [stage for stage in driver.STAGES if stage.name in names]
    return [(str(makes), command[1:]) for makes, command, _ in driver.commands(stages, ["--steps", "2"])]


def test_grpo_needs_no_earlier_stage(driver):
    data, training, asked = planned(driver, "grpo")
    assert data == ("runs/speedrun/tasks", ["-m", "qwen2_jax.speedrun.post_training_data", "runs/speedrun/tasks"])
    assert training[1][1:] == [str(ROOT / "configs/speedrun/grpo.py"), "--steps", "2"]
    assert asked[1] == ["-m", "qwen2_jax.speedrun.alignment_tax", "demo", "runs/speedrun/grpo/hf"]


def test_seeds_have_folders_of_their_own(driver):
    *_, (makes, command), _ = planned(driver, "grpo_seed2")
    assert makes == "runs/speedrun/grpo_seed2/hf"
    assert command[2:6] == ["--seed", "2", "--out", "runs/speedrun/grpo_seed2"]


def test_the_tax_is_measured_from_where_it_is_levied(driver):
    """After the stage that both ways of training start from, and against it."""
    names = [stage.name for stage in driver.STAGES]
    assert names.index("prose") < names.index("tax_adamw")
    assert planned(driver, "tax_ondare")[-1][1][2] == "runs/speedrun/prose/hf"


def test_a_reward_model_is_not_asked_questions(driver):
    assert [makes for makes, _ in planned(driver, "reward")] == ["runs/speedrun/tasks", "runs/speedrun/reward/hf"]


def test_earlier_stages_are_as_they_were(driver):
    data, *_, asked = planned(driver, "sft")
    assert data[0] == "runs/speedrun/data"
    assert asked[0] == "runs/speedrun/sft/skills.jsonl"
    names = [stage.name for stage in driver.STAGES]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize("stage", AFTER)
def test_two_steps_of_each_stage_from_the_demo(stage, tmp_path):
    command = [sys.executable, str(ROOT / "configs/speedrun/run.py"), "--only", stage, "--steps", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    lines = (tmp_path / "runs/speedrun" / stage / "metrics.jsonl").read_text().splitlines()
    scored = [json.loads(line) for line in lines if "held_out" in line]
    assert [line["step"] for line in scored] == [0, 2]
    assert (tmp_path / "runs/speedrun/report/post-training.md").is_file()
