# SPDX-License-Identifier: Apache-2.0
"""dual_chunk_attention: recorded vectors, the definition, and ordinary attention while everything is in one chunk."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention, xla
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.masks import make_masks
from qwen2_jax.kernels.visibility import FAR

from attention_cases import arrays, naive
from attention_layouts import BLOCKS, SHAPES, layouts
from few import MANY, slow
from recorded import recorded_arrays
from tolerance import assert_no_worse, assert_no_worse_at_random, close

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "dca_vectors.npz"


def by_small_blocks(q, q_succ, q_inter, k, v, **layout):
    """The xla implementation with blocks so small that short inputs have several. Returns (out, lse)."""
    masks = make_masks({"q": q}, k, v, **layout)
    return xla.dual_chunk_attention((q, q_succ, q_inter), k, v, masks, **BLOCKS)


def reference(*arrays, **layout):
    return dual_chunk_attention(*arrays, return_lse=True, implementation="reference", **layout)


def eager(q, q_succ, q_inter, k, v, **layout):
    return naive((q, q_succ, q_inter), k, v, **layout)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, queries, k, v, weights, layout):
    """((out, lse), gradients of the three queries, k, v and the scale)."""
    layout = dict(layout)
    scale = layout.pop("scale")

    def total(queries, k, v, scale):
        out, lse = attend(*queries, k, v, scale=scale, **layout)
        finite = jnp.isfinite(lse)
        return (out * weights[0]).sum(dtype=jnp.float32) + jnp.where(finite, lse * weights[1], 0).sum(), (out, lse)

    gradients, results = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(queries, k, v, scale)
    return results, (*gradients[:-1], gradients[-1] / math.prod(k.shape[1:]))  # the scale's is a sum over everything


def uneven_rows():
    """Two rows that see a whole block of keys on different steps back over the chunks."""
    at_BS = np.broadcast_to(np.arange(37, dtype=np.int32), (2, 37))
    layout = {"q_positions_BT": np.stack([at_BS[0, 13:34], at_BS[1, 16:37]]), "kv_positions_BS": at_BS}
    layout |= {"q_segments_BT": np.zeros((2, 21), np.int32), "kv_segments_BS": np.zeros((2, 37), np.int32)}
    layout |= {"window": np.full(2, FAR, np.int32), "scale": np.array([0.1, 0.7], np.float32)}
    return SHAPES[0], 10722, layout | {"chunk_len": np.array([32, 23], np.int32)}


@pytest.mark.slow  # quick: the recorded vectors, and bfloat16 below
@MANY
@example(uneven_rows())
@given(layouts(chunks=True))
def test_equals_the_definition_in_float32(case):
    shape, seed, layout = case
    inputs = arrays(seed, shape, rotations=3)
    exact = value_and_gradients(reference, *inputs, layout)
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), value_and_gradients(by_small_blocks, *inputs, layout), exact)


@MANY
@example(uneven_rows())
@given(layouts(SHAPES[:1], chunks=True))
def test_no_worse_than_plain_bfloat16(case):
    shape, seed, layout = case
    inputs = arrays(seed, shape, jnp.bfloat16, rotations=3)
    got = value_and_gradients(by_small_blocks, *inputs, layout)
    naively = value_and_gradients(eager, *inputs, layout)
    exact = value_and_gradients(reference, *jax.tree.map(lambda x: x.astype(jnp.float32), inputs), layout)
    jax.tree.map(assert_no_worse_at_random, got, naively, exact)


def rotate(x_NTH, positions_T, theta):
    """Rotary embedding, halves rotated against each other, in float64."""
    half = x_NTH.shape[-1] // 2
    angles = np.asarray(positions_T)[:, None] * theta ** (-np.arange(half) / half)
    first, second = x_NTH[..., :half].astype(np.float64), x_NTH[..., half:].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def length_factor(n, trained):
    return np.maximum(1, 0.1 * np.log(n / trained) + 1)


LONGEST = 100  # every recorded case is filled up to this, so that few programs are compiled


def filled(x_NTH):
    """[N, T, H] -> float32 [1, LONGEST, N, H]."""
    return np.pad(x_NTH.swapaxes(0, 1), [(0, LONGEST - x_NTH.shape[1]), (0, 0), (0, 0)])[None].astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def padded_attention(attend, rotated, k, v, n, chunk_len):
    """[N, LONGEST, H], of which the first n tokens are real."""
    at = jnp.where(jnp.arange(LONGEST) < n, jnp.arange(LONGEST), -1)[None]
    layout = {"q_positions_BT": at, "kv_positions_BS": at, "chunk_len": jnp.full(1, chunk_len)}
    return attend(*rotated, k, v, scale=jnp.full(1, k.shape[-1] ** -0.5), **layout)[0][0].swapaxes(0, 1)


@pytest.mark.skipif(not VECTORS.exists(), reason="the recorded vectors lie outside the repository")
@pytest.mark.parametrize("attend", [by_small_blocks, *slow(reference)])
def test_agrees_with_recorded_vectors(attend):
    recorded = recorded_arrays(VECTORS)
    for case in json.loads(str(recorded["meta"])):
        q, k, v, out = (recorded[f"{case['name']}/{name}"] for name in ("q", "k", "v", "out"))
        n, theta = case["n"], case["rope_theta"]
        c, w = case["chunk_size"], case["local_size"]
        if case.get("variant") == "paper":  # the paper counts distances to c - 1 where every implementation goes to c
            c, w = c - 1, w - 1
        s, i = c - w, np.arange(n)
        rotated = [rotate(q, at, theta) for at in (i % s, np.minimum(i % s + s, c), np.full(n, min(2 * s - 1, c)))]
        key = rotate(k, i % s, theta)
        if "original_max_position" in case:
            # Every token has the factor of the whole length, or of the length at which it was added to a prompt.
            length = np.maximum(case["prompt_len"], i + 1) if "prompt_len" in case else np.full(n, n)
            factor = length_factor(length, case["original_max_position"])[:, None]
            rotated, key = [x * factor for x in rotated], key * factor
        q_filled, q_succ, q_inter, k_filled, v_filled = (filled(x) for x in (*rotated, key, v))
        got = padded_attention(attend, (q_filled, q_succ, q_inter), k_filled, v_filled, n, s)
        close(got[:, :n], out, units=12, what=case["name"])  # 3.3 was seen


@pytest.mark.parametrize("dtype", [*slow(jnp.float32), jnp.bfloat16])
def test_one_chunk_is_ordinary_attention_to_the_bit(dtype):
    (q, other, _), k, v, weights = arrays(3, (2, 150, 150, 6, 2, 16), dtype, rotations=3)
    at = jnp.broadcast_to(jnp.arange(150), (2, 150))
    layout = {"q_positions_BT": at, "kv_positions_BS": at, "return_lse": True, "implementation": "xla"}

    @jax.jit
    def ordinary(q, k, v):
        results, pull = jax.vjp(lambda *x: flash_attention(*x, **layout), q, k, v)
        return results, pull(weights)

    @jax.jit
    def chunked(q, k, v, chunk_len):
        attend = lambda q, k, v: dual_chunk_attention(q, other, other, k, v, chunk_len=chunk_len, **layout)
        results, pull = jax.vjp(attend, q, k, v)
        return results, pull(weights)

    for chunk_len in ([150, 150], [2**30, 150]):
        got = chunked(q, k, v, jnp.array(chunk_len))
        jax.tree.map(np.testing.assert_array_equal, got, ordinary(q, k, v))


def test_one_program_serves_every_chunk_length():
    queries, k, v, _ = arrays(4, (1, 20, 20, 2, 1, 8), rotations=3)
    at = jnp.arange(20)[None]
    traces = []

    @jax.jit
    def attend(chunk_len, window):
        traces.append(None)
        layout = {"q_positions_BT": at, "kv_positions_BS": at, "window": window, "chunk_len": chunk_len}
        return dual_chunk_attention(*queries, k, v, implementation="xla", **layout)

    results = [attend(c, w) for c, w in [(5, 20), (100, 20), (5, 7)]]
    assert len(traces) == 1
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
