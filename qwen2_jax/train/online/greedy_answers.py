# SPDX-License-Identifier: Apache-2.0
"""Scores of greedy answers to held-out prompts."""

from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.train.evaluator import HeldOutScores
from qwen2_jax.train.online.sampler import Sampler, lengths, mean
from qwen2_jax.train.step import State
from qwen2_jax.weights.params import Tree


class GreedyAnswers:
    """Of each held-out source the mean of each reward, and the mean length."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, state: State, frozen: Tree | None) -> HeldOutScores:
        scores, run = {}, self.sampler.run
        weights = self.sampler.trainer.policy(state, frozen)
        for name, prompts in self.sampler.job.held_out.items():
            assert isinstance(prompts, Prompts)
            asked = prompts.first(run.evaluation.batches * run.prompts)
            completions, _ = self.sampler.answers(weights, asked, None)
            rewards = self.sampler.scored(asked, completions)
            means = {key: value for key, value in rewards.metrics.items() if key.endswith("/mean")}
            scores[name] = {"reward": mean(rewards.totals), **means, **lengths(completions)}
        return scores
