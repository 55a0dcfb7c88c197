# SPDX-License-Identifier: Apache-2.0
"""The rule of what is visible, against itself spelled out, and the promises made about whole blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_jax.kernels.blockwise import _key_block_order, block_size
from qwen2_jax.kernels.masks import Masks
from qwen2_jax.kernels.visibility import CHUNK_REGIONS, block_regions, bounds, chunk_region, may_see, spans, visible

from few import MANY

TOKENS = st.lists(st.tuples(st.integers(-2, 20), st.integers(0, 2)), min_size=4, max_size=4)


def spelled_out(q, kv, window):
    (q_position, q_segment), (kv_position, kv_segment) = q, kv
    if q_position < 0 or kv_position < 0:
        return False
    return q_segment == kv_segment and kv_position <= q_position and q_position - kv_position < window


@jax.jit
def of_blocks(q_at, q_in, kv_at, kv_in, window, chunk_len):
    """Whether any token may see any, and the nearest and furthest region."""
    q, kv = bounds(q_at, q_in), bounds(kv_at, kv_in)
    return may_see(q, kv, window), *block_regions(q, kv, chunk_len)


@MANY
@given(TOKENS, TOKENS, st.integers(1, 25), st.integers(1, 12))
def test_tokens_and_blocks(q, kv, window, chunk_len):
    (q_at, q_in), (kv_at, kv_in) = np.array(q, np.int32).T, np.array(kv, np.int32).T
    seen = np.asarray(visible(q_at[:, None], kv_at, q_in[:, None], kv_in, window))
    assert seen.tolist() == [[spelled_out(a, b, window) for b in kv] for a in q]

    met, nearest, furthest = map(np.asarray, of_blocks(q_at, q_in, kv_at, kv_in, window, chunk_len))
    assert met or not seen.any(), "a block that somebody sees would be left out"
    regions = np.asarray(chunk_region(q_at[:, None], kv_at, chunk_len))
    alone = np.asarray(visible(q_at[:, None], kv_at, window=window))  # no segments
    for region, (first, last) in enumerate(spans(q_at, window, chunk_len)):
        inside = (np.asarray(first)[:, None] <= kv_at) & (kv_at <= np.asarray(last)[:, None])
        assert (inside == (alone & (regions == region))).all()
    ((first, last),) = spans(q_at, window)
    assert (((np.asarray(first)[:, None] <= kv_at) & (kv_at <= np.asarray(last)[:, None])) == alone).all()
    regions = regions[seen]
    assert ((nearest <= regions) & (regions <= furthest)).all(), "a pair in a region its blocks should not have"


def test_regions_count_chunks_back():
    regions = chunk_region(jnp.array([0, 5, 6, 11, 12, 30])[:, None], jnp.array([0, 5, 6]), 6)
    assert regions.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0], [2, 2, 1], [2, 2, 2]]
    assert int(regions.max()) == CHUNK_REGIONS - 1


def visited(q_positions, kv_positions, window=None, q_segments=None, kv_segments=None, block=4):
    """The (query block, key block) pairs that the loops enter, for one row of tokens."""
    cut = lambda x: None if x is None else jnp.asarray(x).reshape(-1, 1, block)
    window = None if window is None else jnp.array([window])
    kv_bounds = bounds(cut(kv_positions), cut(kv_segments))
    pairs = []
    for i in range(len(q_positions) // block):
        here = bounds(cut(q_positions)[i], None if q_segments is None else cut(q_segments)[i])
        order, count = _key_block_order(here, kv_bounds, Masks(None, None, window, None, None), None)
        pairs += [(i, int(j)) for j in order[:count]]
    return pairs


def test_work_follows_the_mask():
    row = np.arange(32)
    causal = [(i, j) for i in range(8) for j in range(i + 1)]
    assert visited(row, row) == causal
    assert visited(row, row, window=4) == [(i, j) for i, j in causal if i - j <= 1]
    assert visited(row, row, window=1) == [(i, i) for i in range(8)]
    assert visited(row[16:20], row) == [(0, j) for j in range(5)], "a chunk of a prefill sees the cache up to itself"
    assert visited(np.full(8, -1), row) == []
    assert visited(row, np.where(row < 6, row, -1)) == [(i, j) for i, j in causal if j < 2]
    documents = row // 12  # boundaries inside blocks
    expected = [(i, j) for i, j in causal if set(documents[4 * i : 4 * i + 4]) & set(documents[4 * j : 4 * j + 4])]
    assert visited(row, row, None, documents, documents) == expected
    # Packed documents count from zero each: bounds of positions say less, those of documents as much.
    packed = visited(row % 12, row % 12, None, documents, documents)
    assert [(i, j) for i, j in packed if j <= i] == expected
    assert len(packed) <= len(expected) + 1


@pytest.mark.parametrize("length", [1, 2, 7, 100, 128, 129, 500, 512, 4096, 5000])
def test_block_size_wastes_little(length):
    size = block_size(length)
    assert 2 <= size <= 128
    assert -(-length // size) * size < length + max(8, length // 8)
