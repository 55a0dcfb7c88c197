# SPDX-License-Identifier: Apache-2.0
"""Data of the speedrun's stages after fine-tuning: sums in a wording that is new to the demo.

python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks

sums.jsonl           {"prompt": "What do 23 and 45 make?", "answer": "68"}
pairs.jsonl          {"prompt": ..., "chosen": "68", "rejected": "78"}: the right sum and one near it
ranked.jsonl         {"prompt": ..., "responses": ["68", "69", "88", "38"]}: the right sum, then ever larger errors
prose.jsonl          {"text": ...}: docstrings and language reference, as in pre-training
held_out/*.jsonl     the same, from other numbers and documents: the hash of the demo's training data assigns the
                     split. No question occurs twice.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from qwen2_jax.errors import run_and_exit
from qwen2_jax.files.atomic_folder import new_folder
from qwen2_jax.speedrun import skills, stdlib_text
from qwen2_jax.speedrun.corpus import write_jsonl

# The demo adds two numbers almost perfectly in the wordings of skills.SUM_QUESTIONS. In this one its greedy answer is
# right about half of the time, and one of eight samples nearly always: there is something to learn.
QUESTION = "What do {a} and {b} make?"
NEAR = ((1, 2), (10, 20), (30, 40))  # errors of the second, third and fourth response


@dataclasses.dataclass(frozen=True)
class DataSize:
    """Sizes of the data."""

    train: int = 3000  # questions
    held_out: int = 200


class Sum(NamedTuple):
    """A question, its responses, the best (right) one first, and one of the next two."""

    prompt: str
    ranked: list[str]
    near: str


def sums(rng: np.random.Generator, count: int, *, held_out: bool) -> Iterator[Sum]:
    """`count` different questions of one split."""
    seen: set[str] = set()
    while len(seen) < count:
        item = skills.draw(rng, _asked, held_out=held_out)
        if item.question not in seen:
            seen.add(item.question)
            ranked = responses(rng, int(item.answer))
            yield Sum(item.question, ranked, ranked[int(rng.integers(1, 3))])


def _asked(rng: np.random.Generator) -> skills.Item:
    item = skills.sums(rng)
    a, b = item.key.split()[1:]
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return dataclasses.replace(item, question=QUESTION.format(a=a, b=b))


def responses(rng: np.random.Generator, total: int) -> list[str]:
    """The sum and one answer for each error in NEAR, the best first."""
    off = [int(rng.choice(far)) for far in NEAR]
    return [str(total), *(str(total - x if x <= total and rng.random() < 0.5 else total + x) for x in off)]


def write(out: Path, size: DataSize = DataSize(), *, seed: int = 0) -> None:
    """Writes the data to the folder `out`, which appears complete or not at all.

    Raises UserError if `out` exists, OSError if the disk is too small.
    """
    documents = stdlib_text.stdlib_documents()
    with new_folder(out, sum(len(text) for text, is_prose in documents.values() if is_prose)) as folder:
        for inside, held_out in ((folder, False), (folder / "held_out", True)):
            rng = np.random.default_rng([seed, held_out])
            split = stdlib_text.split(documents, held_out=held_out)
            asked = list(sums(rng, size.held_out if held_out else size.train, held_out=held_out))
            write_jsonl(inside, "prose", ({"text": text} for text, is_prose in split.values() if is_prose))
            write_jsonl(inside, "sums", ({"prompt": p, "answer": ranked[0]} for p, ranked, _ in asked))
            write_jsonl(
                inside, "pairs", ({"prompt": p, "chosen": ranked[0], "rejected": near} for p, ranked, near in asked)
            )
            write_jsonl(inside, "ranked", ({"prompt": p, "responses": ranked} for p, ranked, _ in asked))


def main(out: tyro.conf.Positional[Path], *, seed: int = 0, size: DataSize = DataSize()) -> int:
    """Writes the data of the stages after fine-tuning to a new folder."""
    write(out, size, seed=seed)
    print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
