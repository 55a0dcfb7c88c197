# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of the demo's skills on held-out items.

python -m qwen2_jax.speedrun.accuracy --ckpt demo --items 200
"""

import json
import sys
import time
from typing import Any

import numpy as np
import tyro

from qwen2_jax.errors import UserError, run_and_exit
from qwen2_jax.infer.lm import LM, load
from qwen2_jax.speedrun import corpus, skills, stdlib_text
from qwen2_jax.tokenizer import Tokenizer

SKILLS = ("sums", "compare", "copy", "recall", "recall_named")
LONGEST_ANSWER = 64  # tokens
TRIES = 100  # draws per requested item before giving up


class HeldOut:
    """Draws held-out items. Filler sentences and words come from held-out documents, too."""

    def __init__(self, tokenizer: Tokenizer, *, length: int):
        self.tokenizer, self.length = tokenizer, length
        documents = stdlib_text.stdlib_documents()
        train, unseen = (stdlib_text.split(documents, held_out=held_out) for held_out in (False, True))
        self.draw = corpus.Skills.of(train, unseen, tokenizer.vocabulary)

    def items(self, skill: str, count: int, seed: int = 0) -> list[skills.Item]:
        """`count` different items of one skill; recall items cover lengths up to the trained one evenly."""
        if skill not in SKILLS:
            raise UserError(f"unknown skill {skill!r}; choose from {', '.join(SKILLS)}")
        rng = np.random.default_rng([seed, SKILLS.index(skill)])
        found: dict[str, skills.Item] = {}
        for _ in range(TRIES * count):
            if not skill.startswith("recall"):
                item = self.draw.item(rng, skill, held_out=True)
            else:
                characters = int(rng.integers(0, 4 * self.length))
                named = skill == "recall_named"
                item = self.draw.recall(rng, characters, named=named, held_out=True)[0]
            if len(self.prompt(item)) + LONGEST_ANSWER <= self.length:
                found.setdefault(item.key, item)
            if len(found) == count:
                return list(found.values())
        raise UserError(
            f"{len(found)} different items of {skill} found, {count} asked for, that leave room for the answer in "
            f"{self.length} tokens; ask for fewer items or a larger length"
        )

    def prompt(self, item: skills.Item) -> list[int]:
        """Token ids of the prompt of a chat with this one question."""
        return self.tokenizer.chat_ids([{"role": "user", "content": item.question}])


def measure(lm: LM, held_out: HeldOut, count: int, *, batch: int = 32, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Skill -> {accuracy, items, wrong}: greedy answers of a loaded checkpoint, scored by exact match."""
    results = {}
    for skill in SKILLS:
        items = held_out.items(skill, count, seed)
        order = sorted(items, key=lambda item: len(held_out.prompt(item)))  # similar lengths in a batch: less padding
        wrong = []
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            answers = lm.generate([held_out.prompt(i) for i in part], max_new_tokens=LONGEST_ANSWER, temperature=0.0)
            wrong += [(i.question, i.answer, a.text) for i, a in zip(part, answers, strict=True) if a.text != i.answer]
        results[skill] = {"accuracy": 1 - len(wrong) / len(items), "items": len(items), "wrong": wrong[:5]}
    return results


def main(
    *,
    ckpt: str = "demo",
    items: int = 200,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    show_wrong: bool = False,
) -> int:
    """Prints one JSON line per skill.

    Args:
        ckpt: a chat checkpoint: a folder, a name, or "demo".
        items: held-out items per skill.
        length: most tokens of a text with a hidden code; None: the trained length.
        seed: of the drawn items.
        dtype: of weights and activations.
        show_wrong: print a few of the wrong answers.
    """
    if items < 1:
        raise UserError(f"items is {items}; give 1 or more")
    lm = load(ckpt, dtype=dtype)
    if lm.tokenizer is None:
        raise UserError(f"{ckpt} has no tokenizer, which the questions need")
    held_out = HeldOut(lm.tokenizer, length=length or lm.config.trained_length)
    start = time.perf_counter()
    for skill, result in measure(lm, held_out, items, seed=seed).items():
        wrong = result.pop("wrong")
        print(json.dumps({"skill": skill} | result))
        if show_wrong:
            for question, answer, got in wrong:
                print(f"  {question[-120:]!r}: {answer!r} expected, {got!r} given")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
