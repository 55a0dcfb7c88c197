# SPDX-License-Identifier: Apache-2.0
"""What stages differ in: the objective, and where batches come from."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.batch_sources import Corpus, Feed
from qwen2_jax.train.config import Run
from qwen2_jax.train.job import Job
from qwen2_jax.train.objectives import batch_losses
from qwen2_jax.train.objectives.batch_losses import Objective
from qwen2_jax.train.online import episodes, prompt_selection, reference, scoring
from qwen2_jax.train.online.episodes import Answer
from qwen2_jax.train.online.sampled_batches import Sampled
from qwen2_jax.train.post_training_config import Dpo, Grpo, Online, OnlineDpo, Reward
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree


def objective(run: Run, *, groups: int = 1, ranks: int = 1) -> Objective:
    """What the run minimises. groups, ranks: the most groups that a row holds, and sequences that a group has."""
    if isinstance(run, Reward):
        return batch_losses.Ranked(groups, ranks, margin=run.margin, centring=run.centring)
    if isinstance(run, Dpo):
        return batch_losses.Pairs(run.preference, groups)
    if isinstance(run, OnlineDpo):
        most = min(episodes.MOST, run.prompts // run.updates)
        return batch_losses.Pairs(run.preference, most, run.sampling.temperature)
    if isinstance(run, Grpo):
        answers = run.prompts // run.updates * run.sampling.samples
        return batch_losses.Grpo(run.policy, min(episodes.MOST, answers), run.sampling.temperature)
    return batch_losses.NextToken(run.z_loss)


def objective_of(job: Job) -> Objective:
    """What the job's run minimises, on its data."""
    held_out = [data for data in job.held_out.values() if isinstance(data, Loaded)]
    rows = [data for data in (job.data, *held_out) if isinstance(data, Loaded)]
    if not isinstance(job.run, Reward | Dpo):
        return objective(job.run)
    return objective(job.run, groups=max(data.groups_per_row for data in rows), ranks=max(data.ranks for data in rows))


def first_batch(job: Job, trainer: Trainer) -> Batch:
    """What a dry run shows: the first rows, or where answers are to be sampled the first prompts."""
    if isinstance(job.data, Loaded):
        return next(job.data.batches(job.run.rows, host=trainer.place.host))
    assert isinstance(job.run, Online)
    zero = np.zeros(1, np.float32)  # an answer has a token at least: the prompt's last one stands for it
    asked = [
        [Answer(prompt.ids[:-1], np.array(prompt.ids[-1:]), zero, counts=False)]
        for prompt in job.data.batch(0, job.run.prompts)
    ]
    return episodes.pack(asked, rows=job.run.rows, length=job.run.length, pad=job.tokenizer.fill_id)


@contextlib.contextmanager
def feed(
    job: Job, trainer: Trainer, done: int, frozen: Tree | None, kept: dict[str, Any], console: Console
) -> Iterator[Feed]:
    """Batches for the steps after `done`. kept: what the checkpoint of that step has of the feed."""
    run = job.run
    if isinstance(run, Online):
        needs = run.policy.kl > 0 if isinstance(run, Grpo) else True
        weights = reference.weights(job, trainer, frozen) if needs else None
        with contextlib.ExitStack() as stack:
            score = scoring.opened(job, stack, console)
            sampled = Sampled(job, trainer, score, console, reference=weights, kept=kept.get("episode"))
            if run.order == "variance" or run.keep is not None:
                first = reference.weights(job, trainer, frozen) if weights is None else weights
                measure = partial(sampled.measure, first)
                sampled.prompts = prompt_selection.selected(run, sampled.prompts, measure, run.out / "difficulty.json")
            yield sampled
    elif isinstance(run, Dpo) and run.reference == "live":
        weights = reference.weights(job, trainer, frozen)

        def filled(batch: Batch) -> Batch:
            return batch._replace(reference_BT=trainer.logprobs(weights, batch))

        yield Corpus(job, trainer, done, filled)
    elif isinstance(run, Dpo):
        yield Corpus(reference.cached(job, trainer, done, frozen, console), trainer, done)
    else:
        yield Corpus(job, trainer, done)
