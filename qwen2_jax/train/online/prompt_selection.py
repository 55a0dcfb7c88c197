# SPDX-License-Identifier: Apache-2.0
"""Selects the prompts to train on, by the rewards of answers that are sampled once with the initial weights.

A group whose answers are all right or all wrong teaches nothing. Qwen2-Math keeps prompts that 2 to 5 of 8 answers
solve (arXiv:2409.12122, sec. 3.3); Qwen2.5 takes those first whose rewards vary most (arXiv:2412.15115, sec. 4.3).
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qwen2_jax.data.formats.prompts import Prompt, Prompts
from qwen2_jax.errors import UserError
from qwen2_jax.train.post_training_config import Online

# P prompts  Q answers to a prompt


def selected(
    run: Online, prompts: Prompts, rewards: Callable[[Sequence[Prompt], int], np.ndarray], file: Path
) -> Prompts:
    """The prompts that `run.keep` keeps, in the order `run.order`.

    rewards: (prompts, number of this call) -> rewards [P, Q], NaN for an answer without one. file: keeps what was
    measured, so that a run that continues does not measure again. Raises UserError where nothing is left.
    """
    about = {"prompts": prompts.identity, "sampling": str(run.sampling), "seed": run.seed}
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if found.get("about") != about:
        every = prompts.first(len(prompts))
        parts = [every[i : i + run.prompts] for i in range(0, len(every), run.prompts)]
        measured = np.concatenate([rewards(part, number) for number, part in enumerate(parts)])
        found = {"about": about, "rewards": [[None if np.isnan(x) else x for x in row] for row in measured.tolist()]}
        file.parent.mkdir(parents=True, exist_ok=True)
        work = file.with_name(file.name + ".new")
        work.write_text(json.dumps(found) + "\n", "utf-8")
        os.replace(work, file)
    numbers = chosen(np.array(found["rewards"], float), run.order, run.keep)
    if not numbers:
        assert run.keep is not None
        raise UserError(
            f"of {len(prompts)} prompts none has a mean reward from {run.keep[0]:g} to {run.keep[1]:g}; {file} has "
            "what was measured: widen keep, or give other prompts"
        )
    return prompts.subset(numbers, as_given=run.order == "variance")


def chosen(rewards_PQ: np.ndarray, order: str, keep: tuple[float, float] | None) -> list[int]:
    """Numbers of the prompts to take. A prompt none of whose answers has a reward is left out."""
    known_P = ~np.isnan(rewards_PQ).all(1)
    mean_P, spread_P = np.zeros(len(rewards_PQ)), np.zeros(len(rewards_PQ))
    mean_P[known_P], spread_P[known_P] = np.nanmean(rewards_PQ[known_P], 1), np.nanstd(rewards_PQ[known_P], 1)
    if keep is not None:
        known_P &= (mean_P >= keep[0]) & (mean_P <= keep[1])
    (numbers,) = np.nonzero(known_P)
    if order == "variance":
        numbers = numbers[np.argsort(-spread_P[numbers], kind="stable")]
    return numbers.tolist()
