# SPDX-License-Identifier: Apache-2.0
"""Decode attention from its definition: the cache written out in full, then attention over slots that are positions."""

import jax.numpy as jnp

from ..dual_chunk_attention.reference import dual_chunk_attention
from ..flash_attention.reference import flash_attention


def decode_attention(
    q,
    q_succ,
    q_inter,
    k,
    v,
    *,
    chunk_len_B,
    q_positions_BT,
    window_B,
    scale_B,
    block_table_BP=None,
    k_scale=None,
    v_scale=None,
    first,
    return_lse,
):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]), lse whether it is asked for or not."""
    k_BSKH = written_out(k, k_scale, block_table_BP)
    v_BSKH = written_out(v, v_scale, block_table_BP)
    where = {
        "q_positions_BT": q_positions_BT,
        "kv_positions_BS": jnp.broadcast_to(first + jnp.arange(k_BSKH.shape[1]), k_BSKH.shape[:2]),
        "window_B": window_B,
        "scale_B": scale_B,
    }
    if chunk_len_B is None:
        return flash_attention(q, k_BSKH, v_BSKH, **where)
    return dual_chunk_attention(q, q_succ, q_inter, k_BSKH, v_BSKH, chunk_len_B=chunk_len_B, **where)


def written_out(x, scale, block_table_BP):
    """A cache of any layout as [B, S, K, H]; where it is int8, in float32."""
    if scale is not None:
        x = x.astype(jnp.float32) * scale[..., None]
    if block_table_BP is None:
        return x.swapaxes(1, 2)
    x_BPKYH = x[jnp.clip(block_table_BP, 0, x.shape[0] - 1)]  # an entry of an unused page may hold anything
    B, P, K, Y, H = x_BPKYH.shape
    return x_BPKYH.swapaxes(2, 3).reshape(B, P * Y, K, H)
