# SPDX-License-Identifier: Apache-2.0
"""Dual Chunk Attention by blocks in plain XLA, in one pass over the keys. The loop is in blockwise.py."""

import functools

import jax

from ..blockwise import attend
from ..masks import Masks


@functools.partial(jax.jit, static_argnames=("block_q", "block_k"))
def dual_chunk_attention(rotations, k, v, masks: Masks, *, block_q=None, block_k=None):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]). Block sizes follow T and S if not given."""
    return attend(rotations, k, v, masks, block_q=block_q, block_k=block_k)
