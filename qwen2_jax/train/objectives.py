# SPDX-License-Identifier: Apache-2.0
"""What a stage minimises: from the hidden states of packed rows to sums that are divided by a count known before.

A row holds sequences, kept apart by their segments. A group of sequences (a pair, or ranked responses) lies in one
row, and the segment of a sequence is its group's number in the row times K plus its rank, 0 for the best.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from qwen2_jax.data.packing import Batch
from qwen2_jax.logprob import cross_entropy, token_logprobs
from qwen2_jax.model import Qwen2
from qwen2_jax.train.losses import Ratio, Sums

# B batch  T query


class Objective(Protocol):
    """A loss over a batch's rows."""

    temperature: float  # what logits are divided by before they become log-probabilities

    def count(self, batch: Batch) -> jax.Array:
        """What the step's loss is divided by, float32; counts of micro-batches add up."""
        ...

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch) -> Sums: ...


class NextToken:
    """Cross-entropy of the next token, a mean over targets. z_loss: see logprob.cross_entropy."""

    temperature = 1.0

    def __init__(self, z_loss: float = 0.0):
        self.z_loss = z_loss

    def count(self, batch: Batch) -> jax.Array:
        return batch.weights_BT.sum()

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch) -> Sums:
        sums = cross_entropy(hidden_BTD, model.head_weight(), batch.targets_BT, batch.weights_BT, z_loss=self.z_loss)
        return Sums(sums.loss, sums.nll, sums.weight, {"accuracy": Ratio(sums.correct, sums.weight)})


def logprobs(model: Qwen2, hidden_BTD: jax.Array, batch: Batch, temperature: float = 1.0) -> jax.Array:
    """log p of each target in nats, float32 [B, T]; 0 where nothing is a target."""
    found_BT = token_logprobs(hidden_BTD, model.head_weight(), batch.targets_BT)
    return jnp.where(batch.weights_BT > 0, found_BT, 0.0)
