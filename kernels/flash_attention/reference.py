# SPDX-License-Identifier: Apache-2.0
"""Attention from its definition, in float32, with the whole [T, S] table of logits: slow, and easy to believe."""

import jax
import jax.numpy as jnp

from ..visibility import visible


def flash_attention(
    q, k, v, *, q_positions_BT, kv_positions_BS, q_segments_BT=None, kv_segments_BS=None, window_B=None, scale_B
):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N])."""
    G = q.shape[2] // k.shape[2]
    logits_BNTS = query_key(q, k) * scale_B[:, None, None, None]
    seen_BTS = visible(
        q_positions_BT[:, :, None],
        kv_positions_BS[:, None, :],
        None if q_segments_BT is None else q_segments_BT[:, :, None],
        None if kv_segments_BS is None else kv_segments_BS[:, None, :],
        None if window_B is None else window_B[:, None, None],
    )
    p_BNTS, lse_BNT = masked_softmax(logits_BNTS, seen_BTS[:, None])
    v_BSNH = jnp.repeat(v.astype(jnp.float32), G, axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH, precision="highest")
    return out.astype(q.dtype), lse_BNT.swapaxes(1, 2)


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
