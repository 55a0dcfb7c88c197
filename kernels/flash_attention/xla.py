# SPDX-License-Identifier: Apache-2.0
"""Attention by blocks in plain XLA: any device, O(T + S) memory, forward and backward. The loop is in blockwise.py."""

import functools

import jax

from ..blockwise import Rule, Tokens, attend


@functools.partial(jax.jit, static_argnames=("block_q", "block_k"))
def flash_attention(
    q,
    k,
    v,
    *,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window_B=None,
    scale_B,
    block_q=None,
    block_k=None,
):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]). Block sizes follow T and S if not given."""
    return attend(
        (q,),
        k,
        v,
        Tokens(q_positions_BT, q_segments_BT),
        Tokens(kv_positions_BS, kv_segments_BS),
        Rule(window_B, None),
        scale_B,
        block_q=block_q,
        block_k=block_k,
    )
