# SPDX-License-Identifier: Apache-2.0
"""The results of every loss: sums and counts, so that shards and micro-batches add up exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# B batch  T query  Z sequences of a row


class Ratio(NamedTuple):
    """A mean that is not divided yet: ratios of shards and micro-batches add up to the ratio of the whole."""

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """total / weight, 0 if nothing was counted."""
        return self.total / jnp.maximum(self.weight, 1e-9)


Ratios = dict[str, Ratio]


class Sums(NamedTuple):
    """The sums of a loss over some rows. Sums of shards and micro-batches add up to the step's."""

    objective: jax.Array  # the rows' part of the objective, already divided by the step's count
    loss: Ratio  # the reported loss, without auxiliary terms
    metrics: Ratios


def counted(values: jax.Array, weights: jax.Array) -> Ratio:
    """The weighted mean of some values, as a Ratio. Where the weight is 0 a value may be anything, also not finite.

    values, weights: float or bool, of one shape; the sums are floats.
    """
    weights = weights.astype(float)
    return Ratio(jnp.sum(jnp.where(weights > 0, weights * values, 0)), jnp.sum(weights))


def sequence_sums(x_BT: jax.Array, segments_BT: jax.Array, sequences: int) -> jax.Array:
    """Sums over the sequences packed in each row: [B, T] -> [B, Z], Z = `sequences`, in the dtype of x.

    Entry s adds up the positions of segment s, 0 if there are none; segments outside 0..Z-1 (padding is -1) are left
    out. A masked reduction and not a scatter or a product with a one-hot matrix: on TPUs and GPUs XLA fuses the mask
    into it (nothing of size [B, T, Z] is stored, forward or backward), it adds in full float32, and it is divided over
    rows and positions of a mesh like any sum.
    """
    mine_BTZ = segments_BT[..., None] == jnp.arange(sequences)
    return jnp.sum(jnp.where(mine_BTZ, x_BT[..., None], 0), axis=1)
