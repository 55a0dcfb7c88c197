# SPDX-License-Identifier: Apache-2.0
"""decode_attention: the last queries of a sequence against a cache, short and long, dense and paged, wide and int8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_jax.kernels.decode_attention import decode_attention, quantize_cache, xla
from qwen2_jax.kernels.visibility import Bounds

from attention_cases import arrays
from decode_cases import assert_right, case, paged
from few import MANY, slow
from tolerance import close

# B, T, S, N, K, H: one row per key head, which takes a path of its own; and a cache that is visited block by block.
SHAPES = [(2, 1, 48, 3, 3, 8), (2, 2, 2560, 4, 2, 4)]
by_xla = jax.jit(functools.partial(decode_attention, implementation="xla", return_lse=True))


def check(seed, shape, dtype, **options):
    args, kwargs = case(seed, shape, dtype, **options)
    assert_right(by_xla(*args, **kwargs), args, kwargs)


@pytest.mark.parametrize(("dtype", "chunked"), [*slow((jnp.float32, False), (jnp.float32, True)), (jnp.bfloat16, True)])
@MANY
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**16))
def test_equals_the_definition(dtype, chunked, shape, seed):
    check(seed, shape, dtype, chunked=chunked)


FORMS = [
    (SHAPES[0], {"page": 16, "int8": True, "chunked": True}),
    (SHAPES[1], {"page": 64}),
    (SHAPES[1], {"int8": True, "chunked": True}),
    ((2, 1, 4096, 2, 1, 4), {"page": 2048, "int8": True}),
    (SHAPES[0], {"share": True, "chunked": True}),
    (SHAPES[1], {"share": True, "chunked": True}),
    (SHAPES[1], {"share": True, "page": 64}),
]


@MANY
@given(form=st.sampled_from(FORMS), seed=st.integers(0, 2**16))
def test_pages_eight_bits_and_shares(form, seed):
    shape, options = form
    check(seed, shape, jnp.float32, **options)


@MANY
@given(seed=st.integers(0, 2**16), chunked=st.booleans(), shares=st.sampled_from([2, 5]))
def test_shares_of_the_slots_are_merged_by_lse(seed, chunked, shares):
    """What ops does for slots that are divided over devices: shares that see nothing weigh nothing."""
    args, kwargs = case(seed, (2, 2, 40, 4, 2, 8), chunked=chunked)
    *queries, k, v = args
    size = 40 // shares
    found = [by_xla(*queries, *(x[:, :, i * size :][:, :, :size] for x in (k, v)), first=i * size, **kwargs)
             for i in range(shares)]  # fmt: skip
    out, lse = (np.stack(x) for x in zip(*found, strict=True))
    assert (out[lse == -np.inf] == 0).all()
    with np.errstate(invalid="ignore"):
        weight = np.nan_to_num(np.exp(lse - np.logaddexp.reduce(lse)))
    assert_right(jnp.asarray((weight[..., None] * out).sum(0)), args, kwargs)


def test_quantize_cache():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 16)), jnp.bfloat16).at[1, 2, 3].set(0)
    values, scale = quantize_cache(x)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (jnp.int8, x.shape, jnp.float32, x.shape[:3])
    wide = np.asarray(x, np.float32)
    assert (np.abs(values).max(-1) == np.where(wide.any(-1), 127, 0)).all()
    assert (np.abs(values * scale[..., None] - wide) <= 0.5001 * scale[..., None]).all()


def test_work_follows_the_position_not_the_cache():
    """Not-a-number in all of the cache that need not be read: it would spread through any product."""
    S = 4 * xla.BLOCK
    (q,), k, v, _ = arrays(0, (2, 1, S, 2, 1, 4))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    at = {"q_positions_BT": jnp.array([[1500], [-1]]), "implementation": "xla"}
    clean = decode_attention(q, None, None, k, v, **at)
    assert (clean[1] == 0).all()
    later = slice(2 * xla.BLOCK, None)
    poisoned = k.at[:, :, later].set(jnp.nan), v.at[:, :, later].set(jnp.nan)
    np.testing.assert_array_equal(decode_attention(q, None, None, *poisoned, **at), clean)

    in_pages = paged(np.random.default_rng(0), {"k": k, "v": v}, np.full((2, 1), S), 256)
    table = in_pages.pop("block_table_BP")
    unread = table[:, 2 * xla.BLOCK // 256 :]
    poisoned_pages = [x.at[unread].set(jnp.nan) for x in in_pages.values()]
    of_pages = functools.partial(decode_attention, q, None, None, block_table_BP=jnp.asarray(table), **at)
    got = of_pages(**in_pages)
    np.testing.assert_array_equal(of_pages(*poisoned_pages), got)
    close(got, clean, units=16)  # of pages other blocks are added up

    shared = decode_attention(q, None, None, k, v, q_positions_BT=jnp.array([[2500], [999]]), first=1000,
                              implementation="xla")  # fmt: skip
    np.testing.assert_array_equal(shared, clean)

    at |= {"window": 100}
    clean = decode_attention(q, None, None, k, v, **at)
    poisoned = tuple(x.at[:, :, : xla.BLOCK].set(jnp.nan) for x in poisoned)
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


BAD = {
    r"together": {"q_succ": 0},
    r"q_succ must be \(2, 1, 2, 8\)": {"q_succ": jnp.zeros((1, 1, 2, 8)), "q_inter": 0, "chunk_len": 4},
    r"chunk_len must be at least 1, got 0": {"q_succ": 0, "q_inter": 0, "chunk_len": 0},
    r"window must be at least 1, got 0": {"window": 0},
    r"first must be at least 0, got -3": {"first": -3},
    r"first must be one integer, got float32 \(\)": {"first": 1.5},
    r"first must be one integer, got int32 \(2,\)": {"first": jnp.zeros(2, jnp.int32)},
    r"k must be \(2, 1, 6, 8\) .* got \(3, 1, 6, 8\)": {"k": jnp.zeros((3, 1, 6, 8)), "v": jnp.zeros((3, 1, 6, 8))},
    r"v must be \(2, 1, 6, 8\) .* got \(2, 1, 5, 8\)": {"v": jnp.zeros((2, 1, 5, 8))},
    r"v must have the dtype of k, float32, got bfloat16": {"v": jnp.zeros((2, 1, 6, 8), jnp.bfloat16)},
    r"2 query heads cannot share 6": {"k": jnp.zeros((2, 6, 1, 8)), "v": jnp.zeros((2, 6, 1, 8))},
    r"q_positions_BT must be \(2, 1\)": {"q_positions_BT": jnp.zeros((2, 2), jnp.int32)},
    r"block_table_BP must be integers .* got float32": {"block_table_BP": jnp.zeros((2, 3))},
    r"block_table_BP must be \(2, 3\) .* got \(1, 3\)": {"block_table_BP": jnp.zeros((1, 3), jnp.int32)},
    r"at least one slot": {"k": jnp.zeros((2, 1, 0, 8)), "v": jnp.zeros((2, 1, 0, 8))},
    r"k_scale must be given exactly where k and v are int8: it is given": {"k_scale": jnp.zeros((2, 1, 6))},
    r"k_scale must be given .* missing": {n: jnp.zeros((2, 1, 6, 8), jnp.int8) for n in ("k", "v")},
    r"k_scale must be \(2, 1, 6\)": {"k_scale": jnp.zeros((2, 6))},
    r"implementation='cuda' is not one of": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_inputs_say_what_is_allowed(message):
    (q,), k, v, _ = arrays(0, (2, 1, 6, 2, 1, 8))
    inputs = {"q": q, "q_succ": None, "q_inter": None, "k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
    inputs |= {"q_positions_BT": jnp.zeros((2, 1), jnp.int32)} | BAD[message]
    inputs |= {name: q for name in ("q_succ", "q_inter") if isinstance(inputs[name], int)}
    first = [inputs.pop(name) for name in ("q", "q_succ", "q_inter", "k", "v")]
    with pytest.raises(ValueError, match=message):
        decode_attention(*first, **inputs)
