# SPDX-License-Identifier: Apache-2.0
"""Decode attention from its definition: the attention over a whole cache whose slot index is the position."""

import jax.numpy as jnp

from ..dual_chunk_attention.reference import dual_chunk_attention
from ..flash_attention.reference import flash_attention


def decode_attention(q, q_succ, q_inter, k, v, *, chunk_len_B, q_positions_BT, window_B, scale_B):
    """Returns out [B, T, N, H] in q's dtype."""
    where = {
        "q_positions_BT": q_positions_BT,
        "kv_positions_BS": jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]),
        "window_B": window_B,
        "scale_B": scale_B,
    }
    if chunk_len_B is None:
        return flash_attention(q, k, v, **where)[0]
    return dual_chunk_attention(q, q_succ, q_inter, k, v, chunk_len_B=chunk_len_B, **where)[0]
