# SPDX-License-Identifier: Apache-2.0
"""decode_attention: the last queries of a sequence against a cache, short and long, plain and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_jax.kernels.decode_attention import decode_attention, xla
from qwen2_jax.kernels.visibility import Bounds

from attention_cases import arrays, naive
from few import FEW
from tolerance import BFLOAT16, assert_no_worse

# B, T, S, N, K, H: one row per key head, which takes a path of its own; and a cache that is visited block by block.
SHAPES = [(2, 1, 37, 3, 3, 8), (2, 2, 2500, 4, 2, 4)]


@jax.jit
def three_ways(queries, k, v, at, chunk):
    """(xla in the inputs' dtype, eager attention in it, the definition in float32)."""
    B, S = k.shape[:2]
    with_chunks = queries if chunk else (*queries, None, None)
    slots = jnp.broadcast_to(jnp.arange(S), (B, S))
    wide_queries, wide_k, wide_v = jax.tree.map(lambda x: x.astype(jnp.float32), (with_chunks, k, v))
    return (
        decode_attention(*with_chunks, k, v, implementation="xla", **chunk, **at),
        naive(queries, k, v, kv_positions_BS=slots, **chunk, **at)[0],
        decode_attention(*wide_queries, wide_k, wide_v, implementation="reference", **chunk, **at),
    )


@pytest.mark.parametrize(("dtype", "chunked"), [(jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, True)])
@FEW
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**16), windowed=st.booleans())
def test_equals_the_definition(dtype, chunked, shape, seed, windowed):
    B, T, S, *_ = shape
    random = np.random.default_rng(seed)
    queries, k, v, _ = arrays(seed, shape, dtype, rotations=3 if chunked else 1)
    last = random.integers(-1, S + 2, (B, 1))
    at = {"q_positions_BT": np.where(last < 0, -1, last - T + 1 + np.arange(T))}
    at |= {"scale": random.uniform(0.1, 1, B)}
    at |= {"window": random.integers(1, 2 * S, B) if windowed else np.full(B, 2**30)}
    chunk = {"chunk_len": random.integers(2, 2 * S, B)} if chunked else {}

    got, plain, exact = three_ways(queries, k, v, at, chunk)
    assert got.dtype == dtype
    assert_no_worse(got, plain, exact, floor=1e-5 if dtype == jnp.float32 else BFLOAT16)


def test_work_follows_the_position_not_the_cache():
    """Not-a-number in all of the cache that need not be read: it would spread through any product."""
    S = 4 * xla.BLOCK
    (q,), k, v, _ = arrays(0, (2, 1, S, 2, 1, 4))
    at = {"q_positions_BT": jnp.array([[1500], [-1]]), "implementation": "xla"}
    clean = decode_attention(q, None, None, k, v, **at)
    assert (clean[1] == 0).all()
    later = slice(2 * xla.BLOCK, None)
    poisoned = k.at[:, later].set(jnp.nan), v.at[:, later].set(jnp.nan)
    np.testing.assert_array_equal(decode_attention(q, None, None, *poisoned, **at), clean)

    at |= {"window": 100}
    clean = decode_attention(q, None, None, k, v, **at)
    poisoned = tuple(x.at[:, : xla.BLOCK].set(jnp.nan) for x in poisoned)
    np.testing.assert_array_equal(decode_attention(q, None, None, *poisoned, **at), clean)


def test_blocks_to_visit():
    def blocks(positions, window=None):
        low, high = jnp.array([p[0] for p in positions]), jnp.array([p[-1] for p in positions])
        window = None if window is None else jnp.full(len(positions), window)
        return tuple(int(x) for x in xla.blocks_to_visit(Bounds(low, high, None, None), 1000, 100, window))

    nothing = (2**30, -1)
    assert blocks([(0, 0)]) == (0, 1)
    assert blocks([(99, 100)]) == (0, 2)
    assert blocks([(5000, 5000)]) == (0, 10)
    assert blocks([(750, 751), (350, 350)]) == (0, 8)
    assert blocks([(750, 751), (350, 350)], window=100) == (2, 8)
    assert blocks([(750, 751), nothing], window=51) == (7, 8)
    first, end = blocks([nothing])
    assert first >= end


def test_wrong_inputs_say_what_is_allowed():
    (q,), k, v, _ = arrays(0, (2, 1, 6, 2, 1, 8))
    at = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"together"):
        decode_attention(q, q, q, k, v, q_positions_BT=at)
    with pytest.raises(ValueError, match=r"q_succ must be"):
        decode_attention(q, q[:1], q, k, v, q_positions_BT=at, chunk_len=4)
