# SPDX-License-Identifier: Apache-2.0
"""The TPU attention kernels in Pallas's interpreter: flash and dual-chunk, values and gradients, races, counted work.

Two interpreters: `interpret=True` makes an ordinary program of a kernel, which is compiled once and fast from then on;
pltpu.InterpretParams plays the chip's memories and copies step by step, starts them with not-a-number and finds races.
"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention, tpu
from qwen2_jax.kernels.flash_attention import IMPLEMENTATIONS, flash_attention
from qwen2_jax.kernels.flash_attention import tpu as flash_tpu
from qwen2_jax.kernels.masks import make_masks
from qwen2_jax.kernels.target import Target, simulated
from qwen2_jax.kernels.visibility import FAR

from attention_cases import arrays, naive
from attention_layouts import layouts
from few import FEW, slow
from tolerance import BFLOAT16, assert_no_worse

CHIP = "TPU v5 lite"
SHAPE = (2, 75, 90, 4, 2, 64)  # B, T, S, N, K, H: neither length is a multiple of a block
BLOCKS = {"block_q": 32, "block_k": 16}
FEWER = settings(FEW, max_examples=4)  # one costs about a second


def on_chip(operation, queries, k, v, interpret=True, blocks=BLOCKS, **layout):
    """One of the two operations by the TPU kernels, in the interpreter. Returns (out, lse)."""
    with simulated(CHIP, interpret):
        return operation(queries, k, v, make_masks({"q": queries[0]}, k, v, **layout), **blocks)


def chunked(queries, k, v, **layout):
    return on_chip(tpu.attend, queries, k, v, **layout)


def ordinary(queries, k, v, **layout):
    return on_chip(flash_tpu.flash_attention, queries, k, v, **layout)


def chunked_reference(queries, k, v, **layout):
    return dual_chunk_attention(*queries, k, v, return_lse=True, implementation="reference", **layout)


def ordinary_reference(queries, k, v, **layout):
    return flash_attention(*queries, k, v, return_lse=True, implementation="reference", **layout)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, queries, k, v, weights, layout):
    """((out, lse), gradients of the queries, k, v and the scale) of a weighted sum of both results."""
    layout = dict(layout)
    scale = layout.pop("scale")

    def total(queries, k, v, scale):
        out, lse = attend(queries, k, v, scale=scale, **layout)
        return (out * weights[0]).sum(dtype=jnp.float32) + jnp.where(jnp.isfinite(lse), lse * weights[1], 0).sum(), (
            out,
            lse,
        )

    gradients, results = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(queries, k, v, scale)
    return results, (*gradients[:-1], gradients[-1] / math.prod(k.shape[1:]))  # the scale's is a sum over everything


def assert_zero_where_nothing_is_seen(results):
    (out, lse), ((dq, *_), *_) = results
    unseen = np.asarray(lse) == -np.inf
    assert (np.asarray(out, np.float32)[unseen] == 0).all() and (np.asarray(dq, np.float32)[unseen] == 0).all()


@pytest.mark.slow
@FEWER
@given(layouts([SHAPE], chunks=True))
def test_chunked_equals_the_definition_in_float32(case):
    shape, seed, layout = case
    inputs = arrays(seed, shape, rotations=3)
    got, exact = (value_and_gradients(attend, *inputs, layout) for attend in (chunked, chunked_reference))
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), got, exact)
    assert_zero_where_nothing_is_seen(got)


@pytest.mark.slow  # quick: two cores in float32, below
@FEWER
@given(layouts([SHAPE], chunks=True))
def test_chunked_is_no_worse_than_plain_bfloat16(case):
    shape, seed, layout = case
    inputs = arrays(seed, shape, jnp.bfloat16, rotations=3)
    got, plain = (value_and_gradients(attend, *inputs, layout) for attend in (chunked, naive))
    exact = value_and_gradients(chunked_reference, *jax.tree.map(lambda x: x.astype(jnp.float32), inputs), layout)
    assert (got[0][0].dtype, got[0][1].dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=BFLOAT16), got, plain, exact)
    assert_zero_where_nothing_is_seen(got)


def positions(B, T, S):
    """Queries at the end of the keys."""
    at_BS = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    return {"q_positions_BT": at_BS[:, S - T :], "kv_positions_BS": at_BS}


@pytest.mark.slow
@FEWER
@given(layouts([SHAPE]))
def test_one_chunk_is_ordinary_attention_to_the_bit(case):
    shape, seed, layout = case
    S, ((q, other, _), k, v, weights) = shape[2], arrays(seed, shape, jnp.bfloat16, rotations=3)
    one = value_and_gradients(ordinary, (q,), k, v, weights, layout)
    layout |= {"chunk_len": np.array([S, 2**30], np.int32)}
    # Rotations that score nobody may even be infinite: nothing is multiplied by them.
    results, (dqs, *rest) = value_and_gradients(chunked, (q, other, other * jnp.inf), k, v, weights, layout)
    jax.tree.map(np.testing.assert_array_equal, (results, (dqs[:1], *rest)), one)
    assert not any(np.asarray(dq, np.float32).any() for dq in dqs[1:])


@pytest.mark.slow  # quick: what the list of visits holds, test_visits.py
def test_blocks_nobody_sees_are_not_computed():
    """Not-a-number in every key and value that no block of queries may need: it would spread through any product."""
    B, T, S, *_ = SHAPE
    queries, k, v, weights = arrays(7, SHAPE, rotations=3)
    layout = {"q_positions_BT": np.arange(T), "kv_positions_BS": np.arange(S)}
    layout |= {"q_segments_BT": np.zeros(T), "kv_segments_BS": np.zeros(S)}
    layout = {name: np.repeat(x[None].astype(np.int32), B, 0) for name, x in layout.items()}
    layout |= {"window": np.full(B, FAR, np.int32), "chunk_len": np.full(B, 30, np.int32)}
    layout["scale"] = np.full(B, 0.1, np.float32)
    unseen = -(-T // BLOCKS["block_k"]) * BLOCKS["block_k"]
    clean, (dq, dk, dv, _) = value_and_gradients(chunked, queries, k, v, weights, layout)
    k, v = k.at[:, unseen:].set(jnp.nan), v.at[:, unseen:].set(jnp.nan)
    poisoned, gradients = value_and_gradients(chunked, queries, k, v, weights, layout)
    jax.tree.map(np.testing.assert_array_equal, (poisoned, gradients[0]), (clean, dq))
    for gradient, without in zip(gradients[1:3], (dk, dv), strict=True):
        np.testing.assert_array_equal(gradient[:, :unseen], without[:, :unseen])
        assert not np.asarray(without[:, unseen:]).any()


def test_no_races_and_nothing_left_unwritten():
    """Step by step, on two cores with half of the heads each, memories full of not-a-number at first. A race raises."""
    inputs = arrays(4, (1, 24, 32, 2, 2, 64), rotations=3)
    layout = positions(1, 24, 32) | {"chunk_len": np.array([13]), "scale": np.array([0.1], np.float32)}
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    attend = functools.partial(chunked, interpret=careful, blocks={"block_q": 16, "block_k": 32})
    got, exact = (value_and_gradients(attend, *inputs, layout) for attend in (attend, chunked_reference))
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), got, exact)


@pytest.mark.slow
def test_a_list_too_long_for_scalar_memory_is_walked_in_slabs(monkeypatch):
    monkeypatch.setattr(tpu, "_attend_jit", tpu._attend)  # the number of slabs is found while tracing: trace again
    monkeypatch.setattr(tpu, "LIST_BYTES", 4 * 9)  # two rows of 4 blocks of keys at a time, or three of 3 of queries
    shape, blocks = (1, 40, 60, 2, 1, 64), {"block_q": 16, "block_k": 16}
    assert [tpu._slabs(name, tpu.Sizes(16, 16), 1, 1, 40, 60) for name in ("forward", "dq", "dkv")] == [2, 2, 2]
    inputs, layout = arrays(5, shape), positions(1, 40, 60) | {"scale": np.array([0.1], np.float32)}
    attend = functools.partial(ordinary, blocks=blocks)
    got, exact = (value_and_gradients(attend, *inputs, layout) for attend in (attend, ordinary_reference))
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), got, exact)
    monkeypatch.setattr(tpu, "LIST_BYTES", 4 * 3)
    with pytest.raises(NotImplementedError, match=r"needs 3 words of scalar memory.*: 1 rotations \* batch 1 \* 4"):
        ordinary(*inputs[:3], blocks=blocks, **layout)


def test_what_it_does_not_take_it_says():
    def attend(H, dtype, **other):
        (q,), k, v, _ = arrays(0, (1, 4, 4, 2, 1, H), dtype)
        return flash_attention(q, k, v, **positions(1, 4, 4), implementation="tpu", **other)

    with simulated(CHIP, True):
        with pytest.raises(NotImplementedError, match=r"needs a head width of 64 or 128, got 80"):
            attend(80, jnp.float32)
        with pytest.raises(NotImplementedError, match=r"all in bfloat16 or all in float32, got float16"):
            attend(64, jnp.float16)
    with pytest.raises(NotImplementedError, match=r"needs a tpu"):
        attend(64, jnp.float32)


# ---------------------------------------------------------------------- counted work

HEADS_7B = {"B": 1, "N": 28, "K": 4, "H": 128}


def test_count_of_a_case_done_by_hand():
    """4 x 4 blocks of 128: 10 of the 16 are visited, by each of 4 kv heads for 7 heads at once."""
    sizes = {"block_q": 128, "block_k": 128}
    counts = tpu.count(**HEADS_7B, T=512, S=512, on=Target("tpu", CHIP), **sizes)
    product, head = 2 * 128 * 128 * 128 * 28, 128 * 128 * 2
    assert counts["forward"].flops == 10 * 2 * product
    assert counts["backward"].flops == 10 * (3 + 4) * product
    # Of each kv head: a block of 7 heads of q and of out per row, k and v per entry but where the next row begins with
    # the same block of keys (never here: rows begin at the diagonal). Then lse, spans of queries, positions of keys.
    rows, entries = 4 * (2 * 7 * head + 7 * 128 * 4 + 2 * 128 * 4), 10 * (2 * head + 128 * 4)
    assert counts["forward"].hbm_bytes == 4 * (rows + entries)


@pytest.mark.parametrize("chunk_len", [*slow(32768 - 512), 30000])
def test_dual_chunk_costs_what_causal_attention_costs(chunk_len):
    """Within 3% at 131,072 tokens, forward and backward, for chunks that fit the blocks and for chunks that do not."""
    long = HEADS_7B | {"T": 131072, "S": 131072, "on": Target("tpu", CHIP)}
    plain = tpu.count(**long)
    for which, counts in tpu.count(**long, chunk_len=chunk_len).items():
        assert counts.flops <= 1.03 * plain[which].flops
        assert counts.hbm_bytes <= 1.03 * plain[which].hbm_bytes


# ---------------------------------------------------------------------- jax's own kernel

SPLASH = importlib.util.find_spec("jax.experimental.pallas.ops.tpu.splash_attention")


@pytest.mark.slow  # quick: what it refuses, and that it compiles (test_attention_tpu_compiles.py)
@pytest.mark.skipif(SPLASH is None, reason="this jax has no splash attention")
def test_splash_agrees_with_the_definition():
    from qwen2_jax.kernels.flash_attention import splash

    shape = (2, 150, 150, 4, 2, 64)
    B, T = shape[:2]
    inputs = arrays(6, shape)
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    at[1, 130:] = -1
    layout = {"q_positions_BT": at, "kv_positions_BS": at, "scale": np.full(B, 0.1, np.float32)}
    documents = np.repeat((np.arange(T)[None] // 70).astype(np.int32), B, 0)
    layout |= {"q_segments_BT": documents, "kv_segments_BS": documents}

    def attend(queries, k, v, **layout):
        out, lse = on_chip(splash.flash_attention, queries, k, v, blocks={"block": 128}, **layout)
        return out, jax.lax.stop_gradient(lse)

    def exact(queries, k, v, **layout):
        out, lse = ordinary_reference(queries, k, v, **layout)
        return out, jax.lax.stop_gradient(lse)

    got, definition = (value_and_gradients(f, *inputs, layout) for f in (attend, exact))
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), got, definition)
    (lse, pull) = jax.vjp(lambda q: splash._without_gradient(got[0][1], q), inputs[0][0])
    assert np.isnan(pull(jnp.ones_like(lse))[0]).all() and not pull(jnp.zeros_like(lse))[0].any()


@pytest.mark.skipif(SPLASH is None, reason="this jax has no splash attention")
def test_splash_is_taken_by_name_alone_and_refuses_what_it_cannot_see():
    (q,), k, v, _ = arrays(0, (1, 8, 8, 2, 1, 64))
    longer, at = jnp.pad(k, ((0, 0), (0, 1), (0, 0), (0, 0))), positions(1, 8, 8)
    splash = functools.partial(flash_attention, implementation="splash", return_lse=True)
    with simulated(CHIP, True):
        with pytest.raises(NotImplementedError, match=r"needs window=None"):
            splash(q, k, v, **at, window=3)
        with pytest.raises(NotImplementedError, match=r"needs as many queries as keys, the same tokens, got 8 and 9"):
            splash(q, longer, longer, **positions(1, 8, 9))
    assert "splash" not in IMPLEMENTATIONS
