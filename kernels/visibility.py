# SPDX-License-Identifier: Apache-2.0
"""Which query sees which key: the one rule of every attention here, for single tokens and for whole blocks of them.

A token is known by its position in its sequence and by the segment (document) it belongs to. There is no [T, S] mask
anywhere: packing, padding, chunked prefill, cached decode and sliding windows are all the same three comparisons.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FAR = 2**30  # beyond every position: positions and windows are below it, so their differences fit in int32
CHUNK_REGIONS = 3  # own chunk, the chunk before it, all older chunks (Dual Chunk Attention)


def visible(q_positions, kv_positions, q_segments=None, kv_segments=None, window=None):
    """True where a query sees a key: the key is in the same segment, not later, and fewer than `window` tokens back.

    Negative positions mark padding: a padding query sees nothing and a padding key is seen by no query
    (0 <= key <= query says both). All arguments broadcast against each other; segments and window may be None (one
    segment, no window).
    """
    seen = (kv_positions >= 0) & (kv_positions <= q_positions)
    if window is not None:
        seen &= q_positions - kv_positions < window
    if q_segments is not None:
        seen &= q_segments == kv_segments
    return seen


def chunk_region(q_positions, kv_positions, chunk_len):
    """Region of a visible pair: 0 same chunk, 1 the key is one chunk back, 2 further. Chunk = position // chunk_len."""
    return jnp.clip(q_positions // chunk_len - kv_positions // chunk_len, 0, CHUNK_REGIONS - 1)


def spans(q_positions, window=None, chunk_len=None):
    """`visible` and `chunk_region` as two comparisons: the first and the last key position that a query sees.

    One pair for ordinary attention; with chunk_len three, of the keys that its three rotations score. The query sees
    nothing where first > last. First is never negative, so a key that is padding is in no span.
    """
    oldest = jnp.zeros_like(q_positions) if window is None else jnp.maximum(q_positions - window + 1, 0)
    if chunk_len is None:
        return [(oldest, q_positions)]
    mine = q_positions // chunk_len * chunk_len  # where the query's chunk begins
    starts = [(mine, q_positions), (mine - chunk_len, mine - 1), (jnp.zeros_like(mine), mine - chunk_len - 1)]
    return [(jnp.maximum(oldest, first), last) for first, last in starts]


class Bounds(NamedTuple):
    """The ranges of the positions and segments of a block of tokens: all that decides whether a block is skipped.

    Padding (negative positions) does not count. A block of nothing but padding is the empty range low=FAR, high=-1.
    """

    low: jax.Array
    high: jax.Array
    first_segment: Any  # an array; None where there are no segments
    last_segment: Any
    solid: Any = False  # True where the block holds no padding


def bounds(positions, segments=None) -> Bounds:
    """Bounds over the last dimension of positions and segments, both [..., tokens of the block]."""
    real = positions >= 0
    low = jnp.min(positions, axis=-1, where=real, initial=FAR)
    high = jnp.max(positions, axis=-1, where=real, initial=-1)
    solid = jnp.all(real, axis=-1)
    if segments is None:
        return Bounds(low, high, None, None, solid)
    limits = jnp.iinfo(segments.dtype)
    return Bounds(
        low,
        high,
        jnp.min(segments, axis=-1, where=real, initial=limits.max),
        jnp.max(segments, axis=-1, where=real, initial=limits.min),
        solid,
    )


def may_see(q: Bounds, kv: Bounds, window=None):
    """False where no query of one block can see a key of the other: such a pair of blocks is never computed.

    True does not guarantee a visible pair: the bounds are a necessary condition only.
    """
    may = kv.low <= q.high
    if window is not None:
        may &= q.low - kv.high < window
    if q.first_segment is not None:
        may &= (q.first_segment <= kv.last_segment) & (kv.first_segment <= q.last_segment)
    return may


def all_see(q: Bounds, kv: Bounds, window=None):
    """True only where every query of one block sees every key of the other: such a pair needs no mask."""
    whole = q.solid & kv.solid & (kv.high <= q.low)
    if window is not None:
        whole &= q.high - kv.low < window
    if q.first_segment is not None:
        same = q.first_segment == kv.last_segment
        whole &= same & (q.last_segment == kv.first_segment)
    return whole


def block_regions(q: Bounds, kv: Bounds, chunk_len):
    """(nearest, furthest): the least and the largest region of the visible pairs in a pair of blocks."""
    return chunk_region(q.low, kv.high, chunk_len), chunk_region(q.high, kv.low, chunk_len)
