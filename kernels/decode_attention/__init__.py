# SPDX-License-Identifier: Apache-2.0
"""A few new queries per row against a cache of keys and values: the attention of token-by-token generation."""

import jax.numpy as jnp

from ..attention_inputs import check_shapes, per_row, softmax_scale
from ..dispatch import dispatch
from . import reference, xla

IMPLEMENTATIONS = {"xla": xla.decode_attention, "reference": reference.decode_attention}  # fastest first


def decode_attention(
    q, q_succ, q_inter, k, v, *, chunk_len=None, q_positions_BT, window=None, scale=None, implementation=None
):
    """Attention of q [B, T, N, H], T small, over a cache k, v [B, S, K, H] whose slot s holds position s.

    A query sees slot s iff s <= its position and position - s < window. Slots above every position count for nothing
    and may hold anything finite; in a long cache they are not even read: the work follows the largest position, not S.
    A query at a negative position sees nothing and returns zeros.

    Args:
        q_succ, q_inter, chunk_len: Dual Chunk Attention as in dual_chunk_attention; all None for ordinary attention.
        q_positions_BT: int position of every query; one beyond the cache sees the whole cache.
        window, scale, implementation: as in flash_attention.

    Returns out [B, T, N, H] in q's dtype; softmax in float32. Made for inference: no gradient is promised.

    Raises:
        ValueError: shapes do not fit, only some of q_succ, q_inter, chunk_len are given, or an unknown implementation.
    """
    chunked = [x is not None for x in (q_succ, q_inter, chunk_len)]
    if any(chunked) and not all(chunked):
        raise ValueError("give q_succ, q_inter and chunk_len together (Dual Chunk Attention), or none of them")
    queries = {"q": q, "q_succ": q_succ, "q_inter": q_inter} if all(chunked) else {"q": q}
    check_shapes(queries, k, v, q_positions_BT)
    return dispatch(
        IMPLEMENTATIONS,
        implementation,
        q,
        q_succ,
        q_inter,
        k,
        v,
        chunk_len_B=per_row("chunk_len", chunk_len, q.shape[0], jnp.int32),
        q_positions_BT=q_positions_BT,
        window_B=per_row("window", window, q.shape[0], jnp.int32),
        scale_B=softmax_scale(scale, q),
    )
