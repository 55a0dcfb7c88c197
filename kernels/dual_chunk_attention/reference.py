# SPDX-License-Identifier: Apache-2.0
"""Dual Chunk Attention from its definition, in float32: three tables of logits, each entry from the one of its region.

An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models" (arXiv:2402.17463). The sequence is cut
into chunks of `chunk_len` positions. Keys carry their position inside their chunk; the query carries one of three
positions, chosen by how many chunks back the key lies, so that no relative distance beyond the trained length occurs.
"""

import jax.numpy as jnp

from ..flash_attention.reference import masked_softmax, query_key
from ..visibility import chunk_region, visible


def dual_chunk_attention(
    q,
    q_succ,
    q_inter,
    k,
    v,
    *,
    chunk_len_B,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window_B=None,
    scale_B,
):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N])."""
    q_at, kv_at = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    region_BTS = chunk_region(q_at, kv_at, chunk_len_B[:, None, None])
    same, previous, older = query_key(q, k), query_key(q_succ, k), query_key(q_inter, k)
    logits_BNTS = jnp.select([region_BTS[:, None] == 0, region_BTS[:, None] == 1], [same, previous], older)
    seen_BTS = visible(
        q_at,
        kv_at,
        None if q_segments_BT is None else q_segments_BT[:, :, None],
        None if kv_segments_BS is None else kv_segments_BS[:, None, :],
        None if window_B is None else window_B[:, None, None],
    )
    p_BNTS, lse_BNT = masked_softmax(logits_BNTS * scale_B[:, None, None, None], seen_BTS[:, None])
    v_BSNH = jnp.repeat(v.astype(jnp.float32), q.shape[2] // k.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH, precision="highest")
    return out.astype(q.dtype), lse_BNT.swapaxes(1, 2)
