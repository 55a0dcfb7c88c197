# SPDX-License-Identifier: Apache-2.0
"""Reward models: a new score head on a chat model, and the Bradley-Terry loss over ranked responses."""

import dataclasses

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.model import reward
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.objectives.batch_losses import Ranked
from qwen2_jax.train.post_training_config import Reward
from qwen2_jax.train.stage import Stage
from qwen2_jax.weights.params import Tree


class RewardStage(Stage):
    run: Reward

    def architecture(self, config: ModelConfig, name: str) -> ModelConfig:
        """With a score head: the checkpoint's, or a new one."""
        return config if config.scores else dataclasses.replace(config, score_head=self.run.head)

    def load(self, job: TrainingJob, dtype: str) -> Tree:
        assert job.source is not None
        if checkpoint.read_config(job.source).scores:
            return super().load(job, dtype)
        language_model = dataclasses.replace(job.config, score_head=None)
        params = checkpoint.load_params(job.source, language_model, dtype=dtype, mesh=job.mesh, only_layers=True)
        return reward.from_language_model(params, language_model, self.run.head, seed=self.run.seed)[0]

    def check_data(
        self, data: Loaded | Prompts, held_out: dict[str, Loaded | Prompts]
    ) -> tuple[Loaded | Prompts, dict[str, Loaded | Prompts]]:
        return with_equal_ranks(data, held_out)

    def objective(self, *, groups: int = 1, ranks: int = 1) -> Ranked:
        return Ranked(groups, ranks, margin=self.run.margin, centring=self.run.centring)


def with_equal_ranks(
    data: Loaded | Prompts, held_out: dict[str, Loaded | Prompts]
) -> tuple[Loaded, dict[str, Loaded | Prompts]]:
    """All data with groups numbered alike, by the most responses that any prompt has.

    Raises UserError for data without rankings.
    """
    assert isinstance(data, Loaded)
    rows = {name: one for name, one in held_out.items() if isinstance(one, Loaded)}
    ranks = max(one.ranks for one in (data, *rows.values()))
    return data.with_ranks(ranks), {name: one.with_ranks(ranks) for name, one in rows.items()}
