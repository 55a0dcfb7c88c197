# SPDX-License-Identifier: Apache-2.0
"""Dual Chunk Attention from its definition, in float32: three tables of logits, each entry from the one of its region.

An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models" (arXiv:2402.17463). The sequence is cut
into chunks of `chunk_len` positions. Keys carry their position inside their chunk; the query carries one of three
positions, chosen by how many chunks back the key lies, so that no relative distance beyond the trained length occurs.
"""

import jax.numpy as jnp

from ..flash_attention.reference import from_logits, query_key
from ..masks import Masks
from ..visibility import chunk_region


def dual_chunk_attention(rotations, k, v, masks: Masks):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N])."""
    q_at, kv_at = masks.q.positions[:, :, None], masks.kv.positions[:, None, :]
    assert masks.chunk_len_B is not None
    region_BTS = chunk_region(q_at, kv_at, masks.chunk_len_B[:, None, None])
    same, previous, older = (query_key(q, k) for q in rotations)
    logits_BNTS = jnp.select([region_BTS[:, None] == 0, region_BTS[:, None] == 1], [same, previous], older)
    return from_logits(logits_BNTS, v, masks, rotations[0].dtype)
