# SPDX-License-Identifier: Apache-2.0
"""Samples answers to prompts with given weights and has them rewarded; statistics of both."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qwen2_jax.data.formats.prompts import Prompt
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.rollouts import Completion, Rollouts, Stats
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.model import decoder
from qwen2_jax.rewards import Scores as Rewards
from qwen2_jax.tokenizer import IM_END
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.online import episodes
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree

# P prompts  Q answers to a prompt


class Sampler:
    """The generation programs of a run, and its rewards.

    score: (prompts, completions, **columns) -> Rewards, each argument a list with one value per answer.
    """

    def __init__(self, run: Online, job: TrainingJob, trainer: Trainer, score: Callable[..., Rewards]):
        self.run, self.job, self.trainer, self.score = run, job, trainer, score
        # On a CPU a scan over layers copies each layer's cache at every token; unrolled weights, a copy, cost less.
        self._unroll = jax.default_backend() == "cpu" and job.mesh is None
        self._served = jax.jit(lambda weights: decoder.unroll(weights, job.config) if self._unroll else weights)
        self._rollouts = Rollouts.of(
            job.config,
            rows=min(self.run.sampling.rows, self.run.prompts * self.run.sampling.samples),
            length=self.run.longest,
            mesh=job.sampling_mesh,
            dtype=self.run.dtype,
            vocab_size=job.tokenizer.vocab_size,
            unroll=self._unroll,
            long_context=self.run.long_context,
            context=self.run.length,
            implementation=self.run.implementation,
        )

    def answers(
        self, weights: Tree, asked: Sequence[Prompt], seeds: Sequence[int] | None
    ) -> tuple[list[Completion], Stats]:
        """An answer to each prompt; a greedy one where there are no seeds."""
        tokenizer, sampling = self.job.tokenizer, self.run.sampling
        ends = {id for id in (*tokenizer.eos_ids, tokenizer.token_id(IM_END), self.job.answer_end) if id is not None}
        greedy = SamplingParams(max_new_tokens=sampling.max_new_tokens, eos_ids=tuple(sorted(ends)))
        settings = [greedy] * len(asked)
        if seeds is not None:
            settings = [dataclasses.replace(greedy, temperature=sampling.temperature, seed=seed) for seed in seeds]
        requests = [Request(tuple(prompt.ids), one) for prompt, one in zip(asked, settings, strict=True)]
        return self._rollouts(self._served(weights), requests)

    def scored(self, asked: Sequence[Prompt], completions: Sequence[Completion]) -> Rewards:
        tokenizer = self.job.tokenizer
        ids = [completion.tokens.tolist() for completion in completions]
        texts = [tokenizer.decode(tokens[:-1] if tokens[-1] in tokenizer.special_ids else tokens) for tokens in ids]
        names = sorted({name for prompt in asked for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in asked] for name in names}
        return self.score([prompt.messages for prompt in asked], texts, completion_ids=ids, **columns)

    def measure(self, weights: Tree, prompts: Sequence[Prompt], number: int) -> np.ndarray:
        """Rewards [P, Q] of answers that train nothing, NaN where there is none. number: of this call, for seeds."""
        asked = [prompt for prompt in prompts for _ in range(self.run.sampling.samples)]
        completions, _ = self.answers(weights, asked, episodes.seeds(self.run.seed + 1, number, len(asked)))
        return as_array(self.scored(asked, completions)).reshape(len(prompts), -1)


def all_equal(rewards_Q: np.ndarray) -> bool:
    """Whether fewer than two answers have a reward, or all rewards are equal."""
    known = rewards_Q[~np.isnan(rewards_Q)]
    return len(known) < 2 or bool((known == known[0]).all())


def spread(rewards_PQ: np.ndarray) -> float:
    """Mean over the prompts of the standard deviation of their answers' rewards (divided by n - 1)."""
    known = [row[~np.isnan(row)] for row in rewards_PQ]
    return mean([float(row.std(ddof=1)) for row in known if len(row) > 1])


def as_array(rewards: Rewards) -> np.ndarray:
    return np.array([math.nan if x is None else x for x in rewards.totals])


def mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def lengths(completions: Sequence[Completion]) -> dict[str, float]:
    counts = [len(completion.tokens) for completion in completions]
    ended = [n for n, completion in zip(counts, completions, strict=True) if completion.finish_reason == "stop"]
    return {
        "completions/mean_length": mean(counts),
        "completions/min_length": float(min(counts)),
        "completions/max_length": float(max(counts)),
        "completions/mean_terminated_length": mean(ended),
        "completions/clipped_ratio": 1 - len(ended) / len(counts),
    }
