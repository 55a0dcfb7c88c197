# SPDX-License-Identifier: Apache-2.0
"""Decode attention from its definition: the cache written out in full, then attention over slots that are positions."""

import jax.numpy as jnp

from ..dual_chunk_attention.reference import dual_chunk_attention
from ..flash_attention.reference import flash_attention
from ..masks import Masks, Tokens
from .cache import Cache


def decode_attention(rotations, cache: Cache, masks: Masks, *, return_lse):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]), lse whether it is asked for or not."""
    k_BSKH, v_BSKH = written_out(cache, cache.k, cache.k_scale), written_out(cache, cache.v, cache.v_scale)
    positions_BS = jnp.broadcast_to(cache.first + jnp.arange(cache.slots), k_BSKH.shape[:2])
    attention = flash_attention if masks.chunk_len_B is None else dual_chunk_attention
    return attention(rotations, k_BSKH, v_BSKH, masks._replace(kv=Tokens(positions_BS, None)))


def written_out(cache: Cache, x, scale):
    """Keys or values of a cache of any layout as [B, S, K, H]; where it is int8, in float32."""
    if scale is not None:
        x = x.astype(jnp.float32) * scale[..., None]
    if cache.block_table_BP is None:
        return x.swapaxes(1, 2)
    x_BPKYH = x[cache.pages_BP]
    B, P, K, Y, H = x_BPKYH.shape
    return x_BPKYH.swapaxes(2, 3).reshape(B, P * Y, K, H)
