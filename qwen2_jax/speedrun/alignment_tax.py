# SPDX-License-Identifier: Apache-2.0
"""Gain and loss of a stage after fine-tuning: sums in a new wording (post_training_data.py), and pre-training text.

python -m qwen2_jax.speedrun.alignment_tax demo runs/speedrun/grpo/hf
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from qwen2_jax.errors import run_and_exit
from qwen2_jax.infer.lm import LM, load
from qwen2_jax.speedrun import post_training_data, stdlib_text
from qwen2_jax.tokenizer import IM_END


def measure(lm: LM, *, sums: int = 200, texts: int = 32, length: int = 256) -> dict[str, float]:
    """{"sums": share of held-out sums answered right, greedy; "preferred": share of those where the right sum is more
    probable than one near it; "prose": nats per token of held-out prose, the first `length` tokens of each text}."""
    assert lm.tokenizer is not None
    rng = np.random.default_rng([0, True])  # the same sums as in the data files
    held_out = list(post_training_data.sums(rng, sums, held_out=True))
    asked = [lm.tokenizer.chat_ids([{"role": "user", "content": item.prompt}]) for item in held_out]
    right, near = [item.ranked[0] for item in held_out], [item.near for item in held_out]
    answers = lm.generate(asked, max_new_tokens=8, temperature=0.0)
    unseen = stdlib_text.split(stdlib_text.stdlib_documents(), held_out=True)
    prose = [lm.tokenizer.encode(t)[:length] for t, is_prose in unseen.values() if is_prose][:texts]
    return {
        "sums": float(np.mean([a.text == r for a, r in zip(answers, right, strict=True)])),
        "preferred": float(np.mean(_probable(lm, asked, right) > _probable(lm, asked, near))),
        "prose": float(-np.mean(np.concatenate([np.asarray(x) for x in lm.logprobs(prose)]))),
    }


def _probable(lm: LM, asked: list[list[int]], answers: list[str]) -> np.ndarray:
    """log p of each answer and its end token, [n]."""
    assert lm.tokenizer is not None
    ends = [[*lm.tokenizer.encode(answer), *lm.tokenizer.encode(IM_END)] for answer in answers]
    found = lm.logprobs([[*ids, *end] for ids, end in zip(asked, ends, strict=True)])
    return np.array([float(np.sum(x[-len(end) :])) for x, end in zip(found, ends, strict=True)])


def main(checkpoints: tyro.conf.Positional[tuple[str, ...]], *, out: Path | None = None) -> int:
    """Prints one JSON line for each checkpoint.

    Args:
        checkpoints: folders, or "demo".
        out: file to which the lines are appended.
    """
    for name in checkpoints:
        line: dict[str, Any] = {"checkpoint": name} | measure(load(name, dtype="float32"))
        print(json.dumps(line), flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
