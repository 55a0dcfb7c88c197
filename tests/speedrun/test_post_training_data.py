# SPDX-License-Identifier: Apache-2.0
"""Data of the speedrun's stages after fine-tuning: deterministic, right, and of numbers that the demo never added."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.speedrun import post_training_data, skills, stdlib_text
from qwen2_jax.speedrun.stdlib_text import is_held_out

SIZE = post_training_data.DataSize(train=300, held_out=40)


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_package():
    """Prose of one package of the standard library instead of them all."""
    documents = functools.cache(functools.partial(stdlib_text.stdlib_documents, Path(json.__file__).parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_text, "stdlib_documents", documents)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks") / "made"
    post_training_data.write(out, SIZE)
    return out


def test_sums_are_right_and_of_their_split(made):
    for folder, held_out, count in ((made, False, 300), (made / "held_out", True, 40)):
        sums = records(folder, "sums")
        assert len({record["prompt"] for record in sums}) == count
        for record in sums:
            a, b = map(int, re.findall(r"\d+", record["prompt"]))
            assert record["answer"] == str(a + b)
            assert is_held_out(f"sum {min(a, b)} {max(a, b)}") == held_out  # skills.sums' key: never a demo's sum


def test_words_are_new_to_the_demo():
    assert post_training_data.QUESTION not in skills.SUM_QUESTIONS


def test_responses_are_ranked_by_their_distance(made):
    for pair, ranked, asked in zip(*(records(made, name) for name in ("pairs", "ranked", "sums")), strict=True):
        far = [abs(int(response) - int(asked["answer"])) for response in ranked["responses"]]
        assert far == sorted(set(far))
        assert far[0] == 0
        assert pair["chosen"] == asked["answer"]
        assert pair["rejected"] in ranked["responses"][1:3]


def test_small_sums_have_no_negative_neighbours():
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = [int(answer) for answer in post_training_data.responses(rng, 20)]
        assert min(answers) >= 0
        assert len(set(answers)) == 4


def test_the_same_seed_makes_the_same_files(made, tmp_path):
    post_training_data.write(tmp_path / "again", SIZE)
    post_training_data.write(tmp_path / "other", SIZE, seed=1)
    for name in ("sums", "pairs", "ranked", "held_out/sums", "held_out/ranked"):
        same, other = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("again", "other"))
        assert (made / f"{name}.jsonl").read_bytes() == same != other


def test_a_folder_that_is_there_is_left_alone(made):
    with pytest.raises(UserError, match="exists already"):
        post_training_data.write(made, SIZE)
