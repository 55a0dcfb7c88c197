# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the cross-entropy of the next token, on the tokens that an assistant writes."""

import dataclasses

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.stages.pretrain import PretrainStage


class SftStage(PretrainStage):
    def result_config(self, job: TrainingJob) -> ModelConfig:
        """A text ends where the chat template ends an answer."""
        end = job.answer_end
        return job.config if end is None else dataclasses.replace(job.config, eos_token_id=end)
