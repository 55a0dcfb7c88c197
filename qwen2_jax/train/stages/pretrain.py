# SPDX-License-Identifier: Apache-2.0
"""Pre-training: the cross-entropy of the next token."""

from qwen2_jax.train.objectives.batch_losses import NextToken
from qwen2_jax.train.stage import Stage


class PretrainStage(Stage):
    def objective(self, *, groups: int = 1, ranks: int = 1) -> NextToken:
        return NextToken(self.run.z_loss)
