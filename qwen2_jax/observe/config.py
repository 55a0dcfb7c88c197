# SPDX-License-Identifier: Apache-2.0
"""Configuration of logging."""

import dataclasses

from qwen2_jax import validate
from qwen2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """Logging of a run, besides metrics.jsonl."""

    every: int = 10  # steps between lines of metrics
    tensorboard: bool = False  # also write event files to out/tensorboard; needs tensorboardX
    wandb: str | None = None  # project of Weights & Biases to send to; WANDB_MODE=offline is respected
    batch_digest: bool = False  # log a digest of every batch, as a record of the training data
    profile: tuple[int, int] | None = None  # first and last step of a profiler window, written to out/profile

    def __post_init__(self):
        validate.number(self, "log", ("every",), int, 1)
        validate.number(self, "log", ("tensorboard", "batch_digest"), bool)
        if self.wandb is not None and not self.wandb:
            raise UserError("log.wandb is empty; give the name of a Weights & Biases project")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise UserError(f"log.profile is {self.profile}; give the first and the last step, counted from 1")
