# SPDX-License-Identifier: Apache-2.0
"""Configurations of post-training: what follows from what, flags, and mistakes that are told before anything runs."""

from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train import Dpo, Grpo, OnlineDpo, Optim, Sampling, Sft, Start, config_file
from qwen2_jax.train.online import episodes

ROOT = Path(__file__).parents[2]
PROMPTS = PromptData(sources=("prompts.jsonl",), max_tokens=16)


def grpo(kind=Grpo, **changes):
    settings = {
        "start": Start(checkpoint="demo"),
        "data": PROMPTS,
        "rewards": (RewardFunction(function="number"),),
        "prompts": 4,
        "sampling": Sampling(samples=3, max_new_tokens=8),
        "steps": 2,
    }
    return kind(**{**settings, **changes})


def test_rows_hold_the_longest_answers():
    """By hand: 4 prompts x 3 answers of 16 + 8 tokens; two of them in a row of 50; of online DPO 4 pairs."""
    assert (grpo().rows, grpo().length) == (12, 24)
    assert grpo(length=50).rows == 6
    assert grpo(accumulate=5).rows == 15
    assert (grpo(OnlineDpo).rows, grpo(OnlineDpo).length) == (4, 48)
    assert grpo(updates=2).rows == 6
    answer = episodes.Answer(range(16), np.zeros(9, np.int32), np.zeros(9, np.float32))  # 24 inputs
    assert len(episodes.pack([[answer]] * 12, rows=6, length=50, pad=0).tokens_BT) == 6
    with pytest.raises(UserError, match="need 6 rows of 50 tokens, and rows=5"):
        episodes.pack([[answer]] * 12, rows=5, length=50, pad=0)


def test_flags_change_what_rows_and_length_follow_from():
    flags = [
        "--sampling.samples",
        "4",
        "--sampling.max-new-tokens",
        "10",
        "--prompts",
        "2",
        "--data.sources",
        "a.jsonl",
    ]
    run = config_file.load(ROOT / "configs/grpo.py", [*flags, "--policy.kl", "0.01"])
    assert (run.rows, run.length, run.policy.kl, run.data.sources) == (8, 128 + 10, 0.01, ("a.jsonl",))
    assert config_file.load(ROOT / "configs/grpo.py", ["--rows", "100"]).rows == 100


def test_reward_functions_as_words():
    run = config_file.load(ROOT / "configs/grpo.py", ["--rewards", "number", "r.py:brief,weight=0.5,on-error=skip"])
    brief = RewardFunction(function="r.py:brief", weight=0.5, on_error="skip")
    assert run.rewards == (RewardFunction(function="number"), brief)
    assert config_file.load(ROOT / "configs/grpo.py").rewards == (RewardFunction(function="number"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ()}, "no reward for the answers"),
        ({"rewards": RewardFunction(function="number")}, "mind the comma"),
        ({"rewards": ("number",)}, "of qwen2_jax.rewards: mind"),
        ({"data": Data(sources=(Source(path="a.jsonl"),))}, r"Grpo takes PromptData\(sources=\(PATH,\)\)"),
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"length": 20}, "no room for 1 x"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        grpo(**changes)


@pytest.mark.parametrize("kind", [Sft, Dpo])
def test_prompts_are_for_online_stages(kind):
    with pytest.raises(UserError, match=rf"{kind.__name__} takes Data\(sources="):
        kind(start=Start(checkpoint="demo"), data=PROMPTS, rows=1, length=64, steps=1, optim=Optim(lr=1e-3))


def test_the_line_of_a_mistake(tmp_path):
    """Also, where a function is given to a run of the stage Reward, which class takes functions."""
    file = tmp_path / "mine.py"
    file.write_text("from qwen2_jax.train import Reward\n\nconfig = Reward(function='number')\n")
    with pytest.raises(UserError, match=r"mine\.py line 3: .*'function'.* RewardFunction of qwen2_jax\.rewards"):
        config_file.load(file)
