# SPDX-License-Identifier: Apache-2.0
"""What stages differ in: the objective, and where batches come from."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from rich.console import Console

import qwen2_jax
from qwen2_jax.data.loader import Loaded
from qwen2_jax.data.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.params import Tree
from qwen2_jax.rewards import Scorer, Scores, shaped
from qwen2_jax.train import episodes, objectives, reference
from qwen2_jax.train.config import Run
from qwen2_jax.train.feeds import Corpus, Feed
from qwen2_jax.train.job import Job
from qwen2_jax.train.objectives import Objective
from qwen2_jax.train.online import Sampled
from qwen2_jax.train.post_training import Dpo, Grpo, Online, OnlineDpo, Reward, RewardModel
from qwen2_jax.train.step import Trainer


def objective(run: Run, *, groups: int = 1, ranks: int = 1) -> Objective:
    """What the run minimises. groups, ranks: the most groups that a row holds, and sequences that a group has."""
    if isinstance(run, Reward):
        return objectives.Ranked(groups, ranks, margin=run.margin, centring=run.centring)
    if isinstance(run, Dpo):
        return objectives.Pairs(run.preference, groups)
    if isinstance(run, OnlineDpo):
        return objectives.Pairs(run.preference, min(episodes.MOST, run.prompts // run.updates))
    if isinstance(run, Grpo):
        answers = run.prompts // run.updates * run.sampling.samples
        return objectives.Grpo(run.policy, min(episodes.MOST, answers), run.sampling.temperature)
    return objectives.NextToken(run.z_loss)


def objective_of(job: Job) -> Objective:
    """What the job's run minimises, on its data."""
    held_out = [data for data in job.held_out.values() if isinstance(data, Loaded)]
    rows = [data for data in (job.data, *held_out) if isinstance(data, Loaded)]
    if not isinstance(job.run, Reward | Dpo):
        return objective(job.run)
    return objective(job.run, groups=max(data.groups_per_row for data in rows), ranks=max(data.ranks for data in rows))


@contextlib.contextmanager
def feed(
    job: Job, trainer: Trainer, done: int, frozen: Tree | None, kept: dict[str, Any], console: Console
) -> Iterator[Feed]:
    """Batches for the steps after `done`. kept: what the checkpoint of that step has of the feed."""
    run = job.run
    if isinstance(run, Online):
        needs = isinstance(run, OnlineDpo) or run.policy.kl > 0
        weights = reference.weights(job, trainer, frozen) if needs else None
        with Scorer(run.rewards) if run.rewards else contextlib.nullcontext() as scorer:
            for note in scorer.notes if scorer else ():
                console.print(f"note: {note}", soft_wrap=True)
            score = scorer if run.reward_model is None else modelled(run.reward_model, scorer, job)
            yield Sampled(job, trainer, score, console, reference=weights, kept=kept.get("episode"))
    elif isinstance(run, Dpo) and run.reference == "live":
        weights = reference.weights(job, trainer, frozen)

        def filled(batch: Batch) -> Batch:
            return batch._replace(reference_BT=trainer.logprobs(weights, batch))

        yield Corpus(job, trainer, done, filled)
    elif isinstance(run, Dpo):
        yield Corpus(reference.cached(job, trainer, frozen, console), trainer, done)
    else:
        yield Corpus(job, trainer, done)


def modelled(settings: RewardModel, scorer: Scorer | None, job: Job) -> Callable[..., Scores]:
    """Rewards by a reward model, beside or above those of functions."""
    lm = qwen2_jax.load(settings.checkpoint, dtype=settings.dtype, mesh=job.mesh)
    if not lm.config.scores:
        raise UserError(
            f"reward_model.checkpoint {settings.checkpoint} is a model of words; give one that a run of Reward made, "
            "or one whose architectures in config.json are Qwen2ForRewardModel or Qwen2ForSequenceClassification"
        )

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        talks = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, completions, strict=True)]
        by_model = [float(x) for x in lm.score(talks)]
        mean = float(jnp.mean(jnp.asarray(by_model)))
        told = Scores(
            [settings.weight * x for x in by_model], {"model": list(by_model)}, [], {"rewards/model/mean": mean}
        )
        if scorer is None:
            return told
        found = scorer(prompts, completions, **columns)
        totals = (
            shaped(by_model, found.totals)
            if settings.shaped
            else [a if b is None else a + b for a, b in zip(told.totals, found.totals, strict=True)]
        )
        by_name = {**found.by_name, **told.by_name}
        return Scores(totals, by_name, found.failures, {**found.metrics, **told.metrics})

    return score
