# SPDX-License-Identifier: Apache-2.0
"""The visit list of blockwise attention: pairs of query and key blocks to compute, each with a rotation.

A kernel iterates over this list and computes nothing else. So causality, windows, packing and padding cost no work
where a whole block is invisible; and Dual Chunk Attention needs no kernel of its own, only a list whose entries name
one of three rotations of the query. A pair of blocks with a chunk boundary inside is listed once per region that occurs
in it, and the mask of an entry admits only the pairs of tokens of its region: a visible pair is scored exactly once.

B batch, I blocks of rows, J blocks of columns, A rotations of the query, Z entries of the list. A row block stays in
fast memory while a kernel visits its column blocks: rows are blocks of queries in the forward pass and for dq, blocks
of keys for dk and dv.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .masks import Masks
from .visibility import CHUNK_REGIONS, Bounds, all_see, block_regions, bounds, may_see

REGION_BITS, WHOLE_BITS = 2, 1


class Visits(NamedTuple):
    """Entries in the order of the visits: by batch row, row block, region, column block, all ascending.

    `words_Z` are packed int32 (`pack`); only the first `starts[-1]` count. Entries of row block (b, i) and region a are
    words_Z[starts[n] : starts[n + 1]] with n = (b * I + i) * A + a.
    """

    words_Z: jax.Array
    starts: jax.Array  # int32 [B * I * A + 1]


def pack(row, column, region, whole, columns: int):
    """One int32 of an entry. row is b * I + i, and `columns` is J, which fixes the width of the fields."""
    row = (row << column_bits(columns)) | column
    return (((row << REGION_BITS) | region) << WHOLE_BITS) | whole


def unpack(word, columns: int):
    """(row, column, region, whole) of an entry; whole is 1 where every token of the pair sees every other."""
    whole = word & 1
    region = (word >> WHOLE_BITS) & (2**REGION_BITS - 1)
    word = word >> (WHOLE_BITS + REGION_BITS)
    return word >> column_bits(columns), word & (2 ** column_bits(columns) - 1), region, whole


def column_bits(columns: int) -> int:
    return max(1, (columns - 1).bit_length())


def blocks(positions, segments, size: int) -> Bounds:
    """Bounds [B, blocks] of the blocks of `size` tokens of [B, length]; the last block is padded."""
    missing = -positions.shape[1] % size

    def cut(x, fill):
        return jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill).reshape(x.shape[0], -1, size)

    return bounds(cut(positions, -1), None if segments is None else cut(segments, 0))


def plan(q: Bounds, kv: Bounds, *, window_B=None, chunk_len_B=None, by="query", cover=True) -> Visits:
    """The list of all pairs of blocks in which some query may see some key.

    Args:
        window_B: int [B] or None. chunk_len_B: int [B], or None for one rotation (A = 1; otherwise A = 3).
        by: "query" for rows that are blocks of queries, "key" for rows that are blocks of keys.
        cover: give a row block without visible pairs one entry, fully masked, so that a kernel which writes results
            as it visits writes zeros there.
    """
    # [B, I, J]: one side is broadcast along the rows, the other along the columns.
    row, column = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    q = jax.tree.map(row if by == "query" else column, q)
    kv = jax.tree.map(column if by == "query" else row, kv)
    window = None if window_B is None else window_B[:, None, None]
    needed, whole = may_see(q, kv, window), all_see(q, kv, window)
    if chunk_len_B is None:
        needed, whole, A = needed[:, :, None], whole[:, :, None], 1
    else:
        chunk_len = chunk_len_B[:, None, None]
        nearest, furthest = (x[:, :, None] for x in block_regions(q, kv, chunk_len))
        region_A1 = jnp.arange(CHUNK_REGIONS)[:, None]
        needed = needed[:, :, None] & (nearest <= region_A1) & (region_A1 <= furthest)
        whole, A = whole[:, :, None] & (nearest == furthest), CHUNK_REGIONS
    if cover:
        empty = ~jnp.any(needed, axis=(2, 3))
        needed = needed.at[:, :, 0, 0].set(needed[:, :, 0, 0] | empty)

    B, I, _, J = needed.shape
    rows = jnp.arange(B * I, dtype=jnp.int32).reshape(B, I, 1, 1)
    regions = jnp.arange(A, dtype=jnp.int32)[:, None]
    words = pack(rows, jnp.arange(J, dtype=jnp.int32), regions, whole.astype(jnp.int32), J)
    counts = jnp.sum(needed, axis=-1, dtype=jnp.int32).reshape(-1)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return Visits(_compact(words.reshape(-1), needed.reshape(-1)), starts)


def visits_of(masks: Masks, block_q: int, block_k: int, *, by="query", cover=True) -> Visits:
    """The list for blocks of block_q queries and block_k keys; by and cover are those of `plan`."""
    q = blocks(masks.q.positions, masks.q.segments, block_q)
    kv = blocks(masks.kv.positions, masks.kv.segments, block_k)
    return plan(q, kv, window_B=masks.window_B, chunk_len_B=masks.chunk_len_B, by=by, cover=cover)


def _compact(x, wanted):
    """The wanted elements in order, then zeros. (With jnp.nonzero XLA:GPU takes seconds to compile this.)"""
    place = jnp.where(wanted, jnp.cumsum(wanted) - 1, x.size)
    return jnp.zeros_like(x).at[place].set(x, mode="drop", unique_indices=True)
