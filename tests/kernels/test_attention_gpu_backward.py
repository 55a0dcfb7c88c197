# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention on Hopper in Pallas's simulation of the chip, against the definition; what the kernels count.

The results of the forward pass come from the definition, so nothing here depends on the forward kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.masks import Masks, Tokens, make_masks
from qwen2_jax.kernels.visibility import chunk_region, visible

from attention_cases import arrays, naive
from attention_layouts import layouts
from few import FEW, MANY
from tolerance import BFLOAT16, assert_no_worse

gpu = pytest.importorskip("qwen2_jax.kernels.dual_chunk_attention.gpu_backward")
gpu_tiles = pytest.importorskip("qwen2_jax.kernels.dual_chunk_attention.gpu_tiles")
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")

# Of the simulation: jax 0.11's does not run warpgroups of several kinds.
simulated = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="needs the simulation of jax 0.12")

ONE, THREE = (1, 137, 171, 2, 1, 64), (2, 70, 139, 2, 1, 128)  # B, T, S, N, K, H
SMALL = {"block_q": 64, "block_k": 64}  # several blocks in each direction, one consumer


def definition(rotations, k, v, **layout):
    attend = flash_attention if len(rotations) == 1 else dual_chunk_attention
    return attend(*rotations, k, v, return_lse=True, implementation="reference", **layout)


def eager(rotations, k, v, **layout):
    return naive(rotations, k, v, **layout)


@functools.partial(jax.jit, static_argnums=0)
def gradients(attend, rotations, k, v, weights, layout):
    """Of a weighted sum of both results, rows without lse left out: to the rotations, k, v and the scale."""
    layout = dict(layout)
    scale = layout.pop("scale")

    def total(rotations, k, v, scale):
        out, lse = attend(rotations, k, v, scale=scale, **layout)
        return (out * weights[0]).sum(dtype=jnp.float32) + jnp.where(jnp.isfinite(lse), lse * weights[1], 0).sum()

    return as_results(*jax.grad(total, argnums=(0, 1, 2, 3))(rotations, k, v, scale))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients_by_kernel(sizes, detect_races, rotations, k, v, weights, layout):
    out, lse = definition(rotations, k, v, **layout)
    dlse = jnp.where(jnp.isfinite(lse), weights[1], 0)
    masks = make_masks({"q": rotations[0]}, k, v, **layout)
    inputs = rotations, k, v, masks, out, lse, weights[0], dlse
    interpret = params.InterpretGPUParams(detect_races=detect_races)
    return as_results(*gpu.backward(*inputs, **dict(sizes), interpret=interpret))


def as_results(dq, dk, dv, dscale):
    return dq, dk, dv, dscale / math.prod(dk.shape[1:])  # the scale's is a sum over everything


def assert_as_good_as_eager(shape, seed, layout, rotations, sizes=SMALL, detect_races=False):
    inputs = arrays(seed, shape, jnp.bfloat16, rotations)
    got = gradients_by_kernel(tuple(sizes.items()), detect_races, *inputs, layout)
    plain = gradients(eager, *inputs, layout)
    exact = gradients(definition, *jax.tree.map(lambda x: x.astype(jnp.float32), inputs), layout)
    assert {x.dtype for x in jax.tree.leaves(got[:3])} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=BFLOAT16), got, plain, exact)


@pytest.mark.slow
@simulated
@settings(FEW, max_examples=4)
@given(layouts([ONE]))
def test_flash_attention_is_as_good_as_eager_bfloat16(case):
    assert_as_good_as_eager(*case, rotations=1)


@pytest.mark.slow  # quick: one such layout below
@simulated
@settings(FEW, max_examples=4)
@given(layouts([THREE], chunks=True))
def test_dual_chunk_attention_is_as_good_as_eager_bfloat16(case):
    assert_as_good_as_eager(*case, rotations=3)


@simulated
def test_two_consumers_do_not_race():
    """Also the block sizes of the real chip, every stage of the rings used twice, no windows and no documents."""
    B, T, S = 1, 70, 130
    at_S = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    layout = {"q_positions_BT": at_S[:, S - T :], "kv_positions_BS": at_S, "scale": np.full(B, 0.1, np.float32)}
    layout["chunk_len"] = np.full(B, 25, np.int32)
    assert_as_good_as_eager((B, T, S, 2, 1, 64), 0, layout, 3, sizes={}, detect_races=True)
    assert not simulation.get_races().races_found


@MANY
@given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_intervals_say_what_visibility_says(seed, window, chunk_len, segments):
    random = np.random.default_rng(seed)
    q, kv = random.integers(-2, 40, (1, 20)), random.integers(-2, 40, (1, 30))
    q_segments, kv_segments = (random.integers(0, 2, x.shape) if segments else None for x in (q, kv))
    tokens, numbers = (Tokens(q, q_segments), Tokens(kv, kv_segments)), (jnp.array([window]), jnp.array([chunk_len]))
    found = np.asarray(gpu_tiles.query_spans(Masks(*tokens, *numbers, jnp.ones(1)), 32))[0]  # [A, U, 32]
    key = np.asarray(gpu_tiles.key_numbers(tokens[1], 32))[0]  # [U - 1, 32]
    with_rotation = (found[:, 0, :, None] <= key[0]) & (key[0] <= found[:, 1, :, None])
    if segments:
        with_rotation &= found[:, 2, :, None] == key[1]
    assert not with_rotation[:, 20:].any()
    assert not with_rotation[:, :, 30:].any()
    each = lambda x: None if x is None else x[0, :, None]
    seen = visible(each(q), kv[0], each(q_segments), None if kv_segments is None else kv_segments[0], window)
    region = chunk_region(each(q), kv[0], chunk_len)
    for a in range(3):
        np.testing.assert_array_equal(with_rotation[a, :20, :30], seen & (region == a))


def test_chunks_cost_no_work():
    """Seven products of a pair of blocks, of the pairs that causality leaves; chunks only name another rotation."""
    heads = {"N": 28, "K": 4, "H": 128}
    length = 131072
    plain = gpu.count_backward(1, length, length, **heads)
    chunked = gpu.count_backward(1, length, length, **heads, chunk_len=32768 - 512)
    least = 7 * 2 * (length * (length + 1) // 2) * heads["N"] * heads["H"]
    assert least <= plain.flops < 1.01 * least
    assert plain.flops <= chunked.flops < 1.03 * plain.flops
    assert plain.hbm_bytes <= chunked.hbm_bytes < 1.03 * plain.hbm_bytes
    assert plain.fast_memory_bytes <= 227 * 1024


def test_what_it_cannot_take_it_says_before_computing():
    def call(dtype, H):
        (q,), k, v, (dout, dlse) = arrays(0, (1, 8, 8, 1, 1, H), dtype)
        at = jnp.zeros((1, 8), jnp.int32)
        masks = make_masks({"q": q}, k, v, q_positions_BT=at, kv_positions_BS=at)
        return gpu.backward((q,), k, v, masks, q, jnp.zeros((1, 8, 1)), dout, dlse, interpret=False)

    with pytest.raises(NotImplementedError, match="needs bfloat16, q is float32"):
        call(jnp.float32, 64)
    with pytest.raises(NotImplementedError, match="needs a head width of 64 or 128, got 80"):
        call(jnp.bfloat16, 80)
