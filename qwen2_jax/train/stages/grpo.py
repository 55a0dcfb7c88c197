# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimization: every sampled answer, weighed by its advantage over the others."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen2_jax.train.objectives import batch_losses, grpo
from qwen2_jax.train.online import episodes
from qwen2_jax.train.online.episodes import Answer, AnswerGroup
from qwen2_jax.train.post_training_config import Grpo
from qwen2_jax.train.stages.on_answers import OnlineStage


class GrpoStage(OnlineStage):
    run: Grpo

    @property
    def needs_reference(self) -> bool:
        return self.run.policy.kl > 0

    def objective(self, *, groups: int = 1, ranks: int = 1) -> batch_losses.PolicyGradient:
        answers = self.run.prompts // self.run.updates * self.run.sampling.samples
        return batch_losses.PolicyGradient(self.run.policy, min(episodes.MOST, answers), self.run.sampling.temperature)

    def groups(self, answers_PQ: Sequence[Sequence[Answer]], rewards_PQ: np.ndarray) -> list[list[AnswerGroup]]:
        """Every answer by itself, with its advantage over the others to its prompt."""
        advantages_PQ = grpo.advantages(rewards_PQ, self.run.policy)
        return [
            [[self._weighed(answer, float(a))] for answer, a in zip(answers, advantages, strict=True)]
            for answers, advantages in zip(answers_PQ, advantages_PQ, strict=True)
        ]

    def _weighed(self, answer: Answer, advantage: float) -> Answer:
        counts = not (self.run.mask_truncated and answer.truncated)
        return dataclasses.replace(answer, advantage=advantage, counts=counts)
