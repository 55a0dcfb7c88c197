# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens without ever holding the logits of all positions."""

import jax
import jax.numpy as jnp

from qwen2_jax.linear import Weight, linear

# B batch  T query  D model  V vocabulary  C rows of one chunk


def token_logprobs(hidden_BTD: jax.Array, head_VD: Weight, targets_BT: jax.Array, *, chunk: int = 1024) -> jax.Array:
    """log p(target | hidden) in nats, float32 [B, T].

    Logits exist for `chunk` rows at a time, [chunk, V] float32, in the forward and in the backward pass (which
    computes them again), so memory does not grow with the number of tokens.
    """
    B, T, D = hidden_BTD.shape
    rows = B * T
    chunk = min(chunk, rows)
    padding = -rows % chunk
    hidden_CD = jnp.pad(hidden_BTD.reshape(rows, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_C = jnp.pad(targets_BT.reshape(rows), (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one(hidden_CD, targets_C):
        logits_CV = linear(hidden_CD, head_VD, dtype=jnp.float32)
        picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return picked_C - jax.nn.logsumexp(logits_CV, axis=-1)

    logprobs = jax.lax.map(lambda args: one(*args), (hidden_CD, targets_C))
    return logprobs.reshape(-1)[:rows].reshape(B, T)
