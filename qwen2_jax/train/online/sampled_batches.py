# SPDX-License-Identifier: Apache-2.0
"""Batches of the model's own answers: online DPO (Qwen2 report, sec. 4.3) and GRPO.

weights of the step -> answers to an episode's prompts -> rewards -> groups -> rows, with their log-probabilities
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from qwen2_jax.data.formats.prompts import Prompt, Prompts
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.rollouts import Completion, Rollouts, Stats
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.model import decoder
from qwen2_jax.rewards import Scores as Rewards
from qwen2_jax.tokenizer import IM_END
from qwen2_jax.train.batch_sources import Next, Scores
from qwen2_jax.train.job import Job
from qwen2_jax.train.objectives import grpo
from qwen2_jax.train.online import episodes
from qwen2_jax.train.online.episodes import Answer, Group
from qwen2_jax.train.post_training_config import Grpo, Online
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree

# P prompts  G answers to a prompt  B rows  T tokens of a row
FLOAT32_BOUND = 1e-5  # nats: of the sampler against the trainer, where only the order of sums differs


class Sampled:
    """A feed of episodes.

    score: (prompts, completions, **columns) -> Rewards, each argument a list with one value per answer. reference:
    weights that the policy is measured against, None where nothing asks for them. kept: what the checkpoint that the
    run goes on from has of its episode.
    """

    phase = "rollout"

    def __init__(
        self,
        job: Job,
        trainer: Trainer,
        score: Callable[..., Rewards],
        console: Console,
        *,
        reference: Tree | None = None,
        kept: str | None = None,
    ):
        assert isinstance(job.run, Online)
        assert isinstance(job.data, Prompts)
        self.prompts = job.data
        self.job, self.run, self.trainer, self.score = job, job.run, trainer, score
        self.console, self.reference = console, reference
        self.bound = self.run.bound or (FLOAT32_BOUND if self.run.dtype == "float32" else None)
        self._batches = None if kept is None else episodes.decode(kept)
        self._warned = False
        # On a CPU a scan over the layers would copy each one's cache at every token; a copy of the weights costs less.
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

    def next(self, done: int, state: State, frozen: Tree | None) -> Next:
        episode, at = divmod(done, self.run.steps_per_episode)
        told = self._begin(episode, state, frozen) if at == 0 else {}
        assert self._batches is not None
        batch = self._batches[at % self.run.updates]
        return Next(batch, self.trainer.place(batch), told)

    def kept(self, done: int) -> dict[str, Any]:
        between = done % self.run.steps_per_episode == 0
        return {} if between or self._batches is None else {"episode": episodes.encode(self._batches)}

    def evaluate(self, state: State, frozen: Tree | None) -> Scores:
        """Greedy answers to held-out prompts: the mean of each reward, and the mean length."""
        scores, weights = {}, self.trainer.policy(state, frozen)
        for name, prompts in self.job.held_out.items():
            assert isinstance(prompts, Prompts)
            asked = prompts.first(self.run.evaluation.batches * self.run.prompts)
            completions, _ = self._answers(weights, asked, None)
            rewards = self._scored(asked, completions)
            means = {key: value for key, value in rewards.metrics.items() if key.endswith("/mean")}
            scores[name] = {"reward": _mean(rewards.totals), **means, **_lengths(completions)}
        return scores

    def measure(self, weights: Tree, prompts: Sequence[Prompt], number: int) -> np.ndarray:
        """Rewards [P, G] of answers that train nothing, NaN where there is none. number: of this call, for seeds."""
        asked = [prompt for prompt in prompts for _ in range(self.run.sampling.samples)]
        completions, _ = self._answers(weights, asked, episodes.seeds(self.run.seed + 1, number, len(asked)))
        return _array(self._scored(asked, completions)).reshape(len(prompts), -1)

    def _begin(self, episode: int, state: State, frozen: Tree | None) -> dict[str, float]:
        """Samples an episode; returns what to tell of it."""
        run, G = self.run, self.run.sampling.samples
        weights = self.trainer.policy(state, frozen)
        asked = [prompt for prompt in self.prompts.batch(episode, run.prompts) for _ in range(G)]
        completions, stats = self._answers(weights, asked, episodes.seeds(run.seed, episode, len(asked)))
        rewards = self._scored(asked, completions)
        rewards_PG = _array(rewards).reshape(-1, G)
        answers = [
            Answer(prompt.ids, c.tokens, c.logprobs, truncated=c.finish_reason == "length")
            for prompt, c in zip(asked, completions, strict=True)
        ]
        groups_P = groups(run, [answers[i : i + G] for i in range(0, len(answers), G)], rewards_PG)
        share = run.prompts // run.updates
        self._batches = [
            self._rows(weights, [group for some in groups_P[i : i + share] for group in some])
            for i in range(0, run.prompts, share)
        ]
        told = {f"rollouts/{name}": value for name, value in dataclasses.asdict(stats).items()}
        told |= {"reward": _mean(rewards.totals), "reward_std": _spread(rewards_PG), **rewards.metrics}
        told |= {"frac_reward_zero_std": float(np.mean([_equal(row) for row in rewards_PG])), **_lengths(completions)}
        told |= self._compared(self._batches)
        return {name: float(value) for name, value in told.items() if math.isfinite(value)}

    def _answers(
        self, weights: Tree, asked: Sequence[Prompt], seeds: Sequence[int] | None
    ) -> tuple[list[Completion], Stats]:
        """An answer to each prompt; a greedy one where there are no seeds."""
        tokenizer, sampling = self.job.tokenizer, self.run.sampling
        ends = {id for id in (*tokenizer.eos_ids, tokenizer.token_id(IM_END)) if id is not None}
        greedy = SamplingParams(max_new_tokens=sampling.max_new_tokens, eos_ids=tuple(sorted(ends)))
        settings = [greedy] * len(asked)
        if seeds is not None:
            settings = [dataclasses.replace(greedy, temperature=sampling.temperature, seed=seed) for seed in seeds]
        requests = [Request(tuple(prompt.ids), one) for prompt, one in zip(asked, settings, strict=True)]
        return self._rollouts(self._served(weights), requests)

    def _scored(self, asked: Sequence[Prompt], completions: Sequence[Completion]) -> Rewards:
        tokenizer = self.job.tokenizer
        ids = [completion.tokens.tolist() for completion in completions]
        texts = [tokenizer.decode(tokens[:-1] if tokens[-1] in tokenizer.special_ids else tokens) for tokens in ids]
        names = sorted({name for prompt in asked for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in asked] for name in names}
        return self.score([prompt.messages for prompt in asked], texts, completion_ids=ids, **columns)

    def _rows(self, weights: Tree, chosen: Sequence[Group]) -> Batch:
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
                f"bound is {self.bound:g}: what is sampled is not quite what is trained",
                soft_wrap=True,
            )
        mean, high = float(differences.mean()), float(np.quantile(differences, 0.99))
        return {"sampling/mean": mean, "sampling/p99": high, "sampling/max": largest}


def groups(run: Online, answers_PG: Sequence[Sequence[Answer]], rewards_PG: np.ndarray) -> list[list[Group]]:
    """Of each prompt, the groups to train on. rewards: NaN for an answer without one.

    GRPO: every answer by itself, with its advantage over the others. Online DPO: the best and the worst, the first of
    equals; none where all are equally good.
    """
    if isinstance(run, Grpo):
        advantages_PG = grpo.advantages(rewards_PG, run.policy)
        return [
            [[_weighed(answer, float(a), run)] for answer, a in zip(answers, advantages, strict=True)]
            for answers, advantages in zip(answers_PG, advantages_PG, strict=True)
        ]
    pairs: list[list[Group]] = []
    for answers, rewards in zip(answers_PG, rewards_PG, strict=True):
        order = [] if _equal(rewards) else [int(np.nanargmax(rewards)), int(np.nanargmin(rewards))]
        pairs.append([[answers[i] for i in order]] if order else [])
    return pairs


def _weighed(answer: Answer, advantage: float, run: Grpo) -> Answer:
    return dataclasses.replace(answer, advantage=advantage, counts=not (run.mask_truncated and answer.truncated))


def _equal(rewards_G: np.ndarray) -> bool:
    """Whether there is nothing to choose between these."""
    known = rewards_G[~np.isnan(rewards_G)]
    return len(known) < 2 or bool((known == known[0]).all())


def _spread(rewards_PG: np.ndarray) -> float:
    """Mean over the prompts of the standard deviation of their answers' rewards (divided by n - 1)."""
    known = [row[~np.isnan(row)] for row in rewards_PG]
    return _mean([float(row.std(ddof=1)) for row in known if len(row) > 1])


def _array(rewards: Rewards) -> np.ndarray:
    return np.array([math.nan if x is None else x for x in rewards.totals])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _lengths(completions: Sequence[Completion]) -> dict[str, float]:
    lengths = [len(completion.tokens) for completion in completions]
    ended = [n for n, completion in zip(lengths, completions, strict=True) if completion.finish_reason == "stop"]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": _mean(ended),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
    }
