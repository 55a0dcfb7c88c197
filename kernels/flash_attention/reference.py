# SPDX-License-Identifier: Apache-2.0
"""Attention from its definition, in float32, with the whole [T, S] table of logits: slow and simple."""

import jax
import jax.numpy as jnp

from ..masks import Masks


def flash_attention(rotations, k, v, masks: Masks):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N])."""
    (q,) = rotations
    return from_logits(query_key(q, k), v, masks, q.dtype)


def from_logits(logits_BNTS, v, masks: Masks, dtype):
    """(out, lse) from unscaled logits: scale, mask, softmax, the weighted sum of values."""
    N, K = logits_BNTS.shape[1], v.shape[2]
    p_BNTS, lse_BNT = masked_softmax(logits_BNTS * masks.scale_B[:, None, None, None], masks.visible_BTS()[:, None])
    v_BSNH = jnp.repeat(v.astype(jnp.float32), N // K, axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH, precision="highest")
    return out.astype(dtype), lse_BNT.swapaxes(1, 2)


def query_key(q, k):
    """Dot products of every query with every key, float32 [B, N, T, S]; G query heads in a row share a key head."""
    k_BSNH = jnp.repeat(k.astype(jnp.float32), q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k_BSNH, precision="highest")


def masked_softmax(logits, seen):
    """(probabilities, log-sum-exp) over the last dimension; a row that sees nothing gets zeros and -inf."""
    logits = jnp.where(seen, logits, -jnp.inf)
    some = jnp.any(seen, axis=-1)
    # The maximum only keeps exp in range: any number gives the same result, so no gradient flows through it.
    top = jax.lax.stop_gradient(jnp.where(some, logits.max(-1), 0))
    weight = jnp.exp(logits - top[..., None])
    total = jnp.where(some, weight.sum(-1), 1)
    return weight / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)
