# SPDX-License-Identifier: Apache-2.0
"""A few new queries per row against a cache of keys and values: the attention of token-by-token generation."""

import jax.numpy as jnp

from ..dispatch import dispatch, late
from ..masks import Masks, Tokens, row_numbers
from . import reference, xla
from .cache import Cache, check_inputs, first_position, quantize_cache

__all__ = ["IMPLEMENTATIONS", "decode_attention", "quantize_cache"]

IMPLEMENTATIONS = {  # fastest first
    "tpu": late(f"{__name__}.tpu", "decode_attention", "tpu"),
    "gpu": late(f"{__name__}.gpu", "decode_attention", "gpu"),
    "xla": xla.decode_attention,
    "reference": reference.decode_attention,
}


def decode_attention(
    q,
    q_succ,
    q_inter,
    k,
    v,
    *,
    chunk_len=None,
    q_positions_BT,
    window=None,
    scale=None,
    block_table_BP=None,
    k_scale=None,
    v_scale=None,
    first=0,
    return_lse=False,
    implementation=None,
):
    """Attention of q [B, T, N, H], T small, over a cache of S slots per row whose slot s holds position first + s.

    A query sees a slot iff the slot's position is not above its own, and own - the slot's < window. Slots above every
    position count for nothing, may hold anything finite; in a long cache they are not even read: the work follows the
    positions, not S. A query at a negative position, or before `first`, sees nothing and returns zeros.

    Args:
        q_succ, q_inter, chunk_len: Dual Chunk Attention as in dual_chunk_attention; all None for ordinary attention.
        k, v: the cache. Dense: [B, K, S, H], heads before slots. Paged: [pages, K, Y, H] with a block table.
        q_positions_BT: int position of every query; one beyond the cache sees the whole cache.
        window, scale: as in flash_attention.
        block_table_BP: int [B, P] makes the cache paged: slot s of row b is slot s % Y of page
            block_table_BP[b, s // Y], and S = P * Y. Entries of pages that no query of the row sees may hold anything.
        k_scale, v_scale: float32, the shape of k and v without H, for a cache of int8: value = int8 * scale of its
            token and head, as quantize_cache makes them.
        first: int32 scalar, may be traced: the position of slot 0, above 0 where this cache is one device's share of
            slots that are divided over several. Windows and chunks go by position.
        return_lse: return (out, lse) with lse float32 [B, T, N] as flash_attention has it, by which the results of
            several shares are merged: the natural log of the sum of exp of the visible scaled logits, -inf where
            nothing is visible.
        implementation: a name in IMPLEMENTATIONS, or None for the first that takes the inputs.

    Returns out [B, T, N, H] in q's dtype; softmax in float32. Made for inference: no gradient is promised.

    Raises:
        ValueError: shapes or dtypes do not fit, a window or chunk_len is below 1 or first below 0 (where it is no
            traced array), only some of q_succ, q_inter, chunk_len are given, int8 comes without scales or scales
            without int8, or the implementation is unknown.
        NotImplementedError: the named implementation cannot take these inputs.
    """
    chunked = [x is not None for x in (q_succ, q_inter, chunk_len)]
    if any(chunked) and not all(chunked):
        raise ValueError("give q_succ, q_inter and chunk_len together (Dual Chunk Attention), or none of them")
    queries = {"q": q, "q_succ": q_succ, "q_inter": q_inter} if all(chunked) else {"q": q}
    cache = Cache(k, v, block_table_BP, k_scale, v_scale)
    check_inputs(queries, cache, q_positions_BT)
    masks = Masks(Tokens(q_positions_BT, None), None, **row_numbers(q, window, chunk_len, scale))
    cache = cache._replace(
        block_table_BP=None if block_table_BP is None else block_table_BP.astype(jnp.int32),
        first=first_position(first),
    )
    arguments = tuple(queries.values()), cache, masks
    out, lse_BTN = dispatch("decode_attention", IMPLEMENTATIONS, implementation, *arguments, return_lse=return_lse)
    return (out, lse_BTN) if return_lse else out
