# SPDX-License-Identifier: Apache-2.0
"""Online DPO (Qwen2 report, sec. 4.3): the best and the worst of a prompt's sampled answers become a pair."""

from collections.abc import Sequence

import numpy as np

from qwen2_jax.train.objectives.batch_losses import Pairs
from qwen2_jax.train.online import episodes
from qwen2_jax.train.online.episodes import Answer, AnswerGroup
from qwen2_jax.train.online.sampler import all_equal
from qwen2_jax.train.post_training_config import OnlineDpo
from qwen2_jax.train.stages.on_answers import OnlineStage


class OnlineDpoStage(OnlineStage):
    run: OnlineDpo

    def objective(self, *, groups: int = 1, ranks: int = 1) -> Pairs:
        most = min(episodes.MOST, self.run.prompts // self.run.updates)
        return Pairs(self.run.preference, most, self.run.sampling.temperature)

    def groups(self, answers_PQ: Sequence[Sequence[Answer]], rewards_PQ: np.ndarray) -> list[list[AnswerGroup]]:
        """The best and the worst answer, the first of equals; none where all are equally good."""
        pairs: list[list[AnswerGroup]] = []
        for answers, rewards in zip(answers_PQ, rewards_PQ, strict=True):
            order = [] if all_equal(rewards) else [int(np.nanargmax(rewards)), int(np.nanargmin(rewards))]
            pairs.append([[answers[i] for i in order]] if order else [])
        return pairs
