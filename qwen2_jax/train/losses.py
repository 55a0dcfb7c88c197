# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays that return sums and counts, so that shards and micro-batches add up exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.logprob import token_logprobs

# B batch  T tokens  D model  V vocabulary


class TokenLoss(NamedTuple):
    """`total` nats over targets of total weight `weight`; divide only after everything has been added."""

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """Loss per target; 0 where there is no target."""
        return self.total / jnp.maximum(self.weight, 1e-9)


def next_token_loss(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, chunk: int = 2048
) -> TokenLoss:
    """Weighted cross-entropy of each target given its hidden state, in float32; logits of `chunk` rows at a time."""
    weights_BT = weights_BT.astype(jnp.float32)
    logprobs_BT = token_logprobs(hidden_BTD, head_VD, targets_BT, chunk=chunk)
    # where, not only a product: a padded position may hold anything, and 0 * inf is nan
    total = -jnp.sum(jnp.where(weights_BT > 0, logprobs_BT * weights_BT, 0.0))
    return TokenLoss(total, weights_BT.sum())


def objective(
    tokens: TokenLoss,
    *,
    load_balancing: jax.Array | float = 0.0,
    router_z: jax.Array | float = 0.0,
    load_balancing_coefficient: float = 0.0,
    router_z_coefficient: float = 0.0,
) -> jax.Array:
    """What is minimised: mean token loss, plus the two router losses of a sparse model where they are asked for."""
    return tokens.mean() + load_balancing_coefficient * load_balancing + router_z_coefficient * router_z
