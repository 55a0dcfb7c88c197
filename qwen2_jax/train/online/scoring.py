# SPDX-License-Identifier: Apache-2.0
"""Rewards an episode's answers: with functions, a reward model, or both."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from qwen2_jax.errors import UserError
from qwen2_jax.infer.lm import LM, load
from qwen2_jax.rewards import Scorer, Scores, shaped
from qwen2_jax.train.post_training_config import Online, RewardModel

Score = Callable[..., Scores]  # (prompts, completions, **columns), each a list with one value per answer


def opened(run: Online, mesh: jax.sharding.Mesh | None, stack: contextlib.ExitStack, console: Console) -> Score:
    """The function that scores a run's answers; the stack closes it. Prints failures that do not end the run."""
    functions = stack.enter_context(Scorer(run.rewards)) if run.rewards else None
    for note in () if functions is None else functions.notes:
        console.print(f"note: {note}", soft_wrap=True)
    model = run.reward_model
    lm = None if model is None else _loaded(model, mesh)

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        found = None if functions is None else functions(prompts, completions, **columns)
        for failure in () if found is None else found.failures:
            console.print(f"warning: {failure}", soft_wrap=True)
        if lm is None or model is None:
            assert found is not None
            return found
        talks = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, completions, strict=True)]
        return _joined(model, [float(score) for score in lm.score(talks)], found)

    return score


def _loaded(settings: RewardModel, mesh: jax.sharding.Mesh | None) -> LM:
    lm = load(settings.checkpoint, dtype=settings.dtype, mesh=mesh)
    if not lm.config.scores:
        raise UserError(
            f"reward_model.checkpoint {settings.checkpoint} is a language model; give one that a run of Reward made, "
            "or one whose architectures in config.json are Qwen2ForRewardModel or Qwen2ForSequenceClassification"
        )
    return lm


def _joined(settings: RewardModel, scores: list[float], functions: Scores | None) -> Scores:
    """The model's scores beside the functions' sum, or below it as a verdict."""
    mean = {"rewards/model/mean": statistics.fmean(scores), "rewards/model/std": statistics.pstdev(scores)}
    weighted = [settings.weight * score for score in scores]
    if functions is None:
        return Scores([*weighted], {"model": [*scores]}, [], mean)
    totals: list[float | None]
    if settings.shaped:
        totals = shaped(scores, functions.totals)
    else:
        totals = [None if other is None else x + other for x, other in zip(weighted, functions.totals, strict=True)]
    return Scores(totals, functions.by_name | {"model": [*scores]}, functions.failures, functions.metrics | mean)
