# SPDX-License-Identifier: Apache-2.0
"""The list of visits: every visible pair of tokens is in exactly one entry, and no block that nobody sees is listed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from qwen2_jax.kernels.visibility import CHUNK_REGIONS, FAR, chunk_region, visible
from qwen2_jax.kernels.visits import blocks, pack, plan, unpack

from attention_layouts import layouts
from few import MANY

QUERIES, KEYS = 8, 16  # tokens of a block


def entries(visits, row_blocks, columns, rotations):
    """The list as numpy, checked against its own index: [(b, row block, column, region, whole)]."""
    count = int(visits.starts[-1])
    row, column, region, whole = (np.asarray(x) for x in unpack(np.asarray(visits.words_Z)[:count], columns))
    starts = np.asarray(visits.starts)
    where = np.searchsorted(starts, np.arange(count), side="right") - 1
    np.testing.assert_array_equal(where, row * rotations + region)
    key = np.lexsort((column, region, row))
    np.testing.assert_array_equal(key, np.arange(count))
    return list(zip(row // row_blocks, row % row_blocks, column, region, whole, strict=True))


@functools.partial(jax.jit, static_argnames="by")  # one program per shape
def visits_of_layout(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, window, chunk_len, by):
    q_blocks = blocks(q_positions_BT, q_segments_BT, QUERIES)
    kv_blocks = blocks(kv_positions_BS, kv_segments_BS, KEYS)
    return plan(q_blocks, kv_blocks, window_B=window, chunk_len_B=chunk_len, by=by)


@pytest.mark.parametrize("by", ["query", "key"])
@pytest.mark.parametrize("chunked", [False, True])
@MANY
@given(layouts(chunks=True))
def test_every_visible_pair_once(by, chunked, case):
    (B, T, S, *_), _, at = case
    chunk_len = at["chunk_len"] if chunked else None
    rotations = CHUNK_REGIONS if chunked else 1
    q, kv = at["q_positions_BT"], at["kv_positions_BS"]
    counts = -(-T // QUERIES), -(-S // KEYS)
    visits = visits_of_layout(q, kv, at["q_segments_BT"], at["kv_segments_BS"], at["window"], chunk_len, by=by)
    rows, columns = counts if by == "query" else counts[::-1]

    seen = np.asarray(
        visible(
            q[:, :, None],
            kv[:, None],
            at["q_segments_BT"][:, :, None],
            at["kv_segments_BS"][:, None],
            at["window"][:, None, None],
        )
    )
    region_of = (
        np.zeros((B, T, S)) if chunk_len is None else chunk_region(q[:, :, None], kv[:, None], chunk_len[:, None, None])
    )
    admitted, covered = np.zeros((B, T, S), int), set()
    for b, row, column, region, whole in entries(visits, rows, columns, rotations):
        i, j = (row, column) if by == "query" else (column, row)
        at_pair = np.s_[b, i * QUERIES : (i + 1) * QUERIES, j * KEYS : (j + 1) * KEYS]
        mine = seen[at_pair] & (np.asarray(region_of[at_pair]) == region)
        if whole:
            assert mine.all()
            assert mine.size == QUERIES * KEYS, "a block with filling is not whole"
        admitted[at_pair] += mine
        covered.add((b, row))
    np.testing.assert_array_equal(admitted, seen)
    assert covered == {(b, row) for b in range(B) for row in range(rows)}


@jax.jit
def entries_in(q, kv, **which):
    return plan(q, kv, **which).starts[-1]


def test_causal_blocks_are_half_and_a_window_leaves_a_band():
    at = jnp.arange(64)[None]
    q, kv = blocks(at, None, 8), blocks(at, None, 8)
    assert int(entries_in(q, kv)) == 8 * 9 // 2
    assert int(entries_in(q, kv, window_B=jnp.array([8]))) == 8 + 7
    assert int(entries_in(q, kv, window_B=jnp.array([9]))) == 8 + 7
    assert int(entries_in(q, kv, window_B=jnp.array([10]))) == 8 + 7 + 6


def test_a_block_with_a_chunk_boundary_inside_is_listed_once_per_region():
    at = jnp.arange(64)[None]
    q, kv = blocks(at, None, 8), blocks(at, None, 8)
    assert int(entries_in(q, kv, chunk_len_B=jnp.array([16]))) == 8 * 9 // 2  # boundaries between blocks
    assert int(entries_in(q, kv, chunk_len_B=jnp.array([FAR]))) == 8 * 9 // 2
    # chunk 20: blocks 2, 5 and 7 hold a boundary (positions 20, 40, 60)
    regions = np.asarray(chunk_region(at[0][:, None], at[0][None], 20)).reshape(8, 8, 8, 8)
    pairs = [(i, j, r) for i in range(8) for j in range(i + 1) for r in set(regions[i, :, j].reshape(-1))]
    listed = int(entries_in(q, kv, chunk_len_B=jnp.array([20])))
    assert listed == len(pairs)


def test_words():
    for columns in (1, 2, 5, 4096):
        entry = np.array([3, columns - 1, 2, 1])
        assert [int(x) for x in unpack(pack(*entry, columns), columns)] == list(entry)
