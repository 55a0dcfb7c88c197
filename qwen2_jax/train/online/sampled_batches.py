# SPDX-License-Identifier: Apache-2.0
"""Batches of the model's own answers: online DPO (Qwen2 report, sec. 4.3) and GRPO.

current weights -> answers to an episode's prompts -> rewards -> groups -> rows, with their log-probabilities
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.batch_sources import Next
from qwen2_jax.train.online import episodes
from qwen2_jax.train.online.episodes import Answer, AnswerGroup
from qwen2_jax.train.online.sampler import Sampler, all_equal, as_array, lengths, mean, spread
from qwen2_jax.train.step import State
from qwen2_jax.weights.params import Tree

# P prompts  Q answers to a prompt  B rows  T tokens of a row
FLOAT32_BOUND = 1e-5  # nats: of the sampler against the trainer, where only the order of sums differs


class Sampled:
    """A feed of episodes.

    groups: (answers_PQ, rewards_PQ) -> of each prompt, the groups of answers to train on. reference: weights that the
    policy is compared with, None where the objective needs none. kept: what the checkpoint that the run continues from
    holds of its episode.
    """

    phase = "rollout"

    def __init__(
        self,
        sampler: Sampler,
        groups: Callable[[Sequence[Sequence[Answer]], np.ndarray], list[list[AnswerGroup]]],
        console: Console,
        *,
        reference: Tree | None = None,
        kept: str | None = None,
    ):
        assert isinstance(sampler.job.data, Prompts)
        self.prompts = sampler.job.data
        self.sampler, self.job, self.run, self.trainer = sampler, sampler.job, sampler.run, sampler.trainer
        self.groups, self.console, self.reference = groups, console, reference
        self.bound = self.run.bound or (FLOAT32_BOUND if self.run.dtype == "float32" else None)
        self._batches = None if kept is None else episodes.decode(kept)
        self._warned = self._unrewarded = False

    def next(self, done: int, state: State, frozen: Tree | None) -> Next:
        episode, at = divmod(done, self.run.steps_per_episode)
        metrics = self._begin(episode, state, frozen) if at == 0 else {}
        assert self._batches is not None
        batch = self._batches[at % self.run.updates]
        return Next(batch, metrics)

    def kept(self, done: int) -> dict[str, Any]:
        between = done % self.run.steps_per_episode == 0
        return {} if between or self._batches is None else {"episode": episodes.encode(self._batches)}

    def _begin(self, episode: int, state: State, frozen: Tree | None) -> dict[str, float]:
        """Samples an episode; returns its metrics."""
        run, samples = self.run, self.run.sampling.samples
        weights = self.trainer.policy(state, frozen)
        asked = [prompt for prompt in self.prompts.batch(episode, run.prompts) for _ in range(samples)]
        completions, stats = self.sampler.answers(weights, asked, episodes.seeds(run.seed, episode, len(asked)))
        rewards = self.sampler.scored(asked, completions)
        rewards_PQ = as_array(rewards).reshape(-1, samples)
        answers = [
            Answer(prompt.ids, c.tokens, c.logprobs, truncated=c.finish_reason == "length")
            for prompt, c in zip(asked, completions, strict=True)
        ]
        groups_P = self.groups([answers[i : i + samples] for i in range(0, len(answers), samples)], rewards_PQ)
        share = run.prompts // run.updates
        self._batches = []
        for i in range(0, run.prompts, share):
            # Where no answer has a reward there is nothing to learn: a step without targets, which counts as skipped.
            chosen = [] if np.isnan(rewards_PQ[i : i + share]).all() else groups_P[i : i + share]
            self._batches.append(self._rows(weights, [group for some in chosen for group in some]))
        if np.isnan(rewards_PQ).all() and not self._unrewarded:
            self._unrewarded = True
            self.console.print(
                f"warning: no answer got a reward: all functions returned None for the {len(answers)} answers of "
                f"episode {episode + 1}. The run ends after guard.patience={run.guard.patience} such steps in a row",
                soft_wrap=True,
            )
        metrics = {f"rollouts/{name}": value for name, value in dataclasses.asdict(stats).items()}
        metrics |= {"reward": mean(rewards.totals), "reward_std": spread(rewards_PQ), **rewards.metrics}
        metrics |= {
            "frac_reward_zero_std": float(np.mean([all_equal(row) for row in rewards_PQ])),
            **lengths(completions),
        }
        metrics |= self._compared(self._batches)
        return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}

    def _rows(self, weights: Tree, chosen: Sequence[AnswerGroup]) -> Batch:
        """The groups as rows, with the log-probabilities that their steps need."""
        run, trainer = self.run, self.trainer
        piece, pad = run.accumulate * self.job.row_parts, self.job.tokenizer.fill_id
        batch = episodes.pack(chosen, rows=run.rows, length=run.length, pad=pad, piece=piece)
        placed = trainer.place(batch)
        batch = batch._replace(old_BT=trainer.place.back(trainer.logprobs(weights, placed)))
        if self.reference is None:
            return batch
        return batch._replace(reference_BT=trainer.place.back(trainer.logprobs(self.reference, placed)))

    def _compared(self, batches: Sequence[Batch]) -> dict[str, float]:
        """How far the sampler's log-probabilities are from the trainer's, over the tokens that are trained."""
        differences = np.concatenate([np.abs(b.old_BT - b.sampled_BT)[b.weights_BT > 0] for b in batches])
        if not len(differences):
            return {}
        largest = float(differences.max())
        if self.bound is not None and largest > self.bound and not self._warned:
            self._warned = True
            self.console.print(
                f"warning: log-probabilities of the sampler and the trainer differ by up to {largest:.2g} nats; the "
                f"bound is {self.bound:g}: the sampled distribution is not quite the trained one",
                soft_wrap=True,
            )
        mean, high = float(differences.mean()), float(np.quantile(differences, 0.99))
        return {"sampling/mean": mean, "sampling/p99": high, "sampling/max": largest}
