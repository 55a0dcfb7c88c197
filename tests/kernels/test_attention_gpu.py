# SPDX-License-Identifier: Apache-2.0
"""flash_attention and dual_chunk_attention for Hopper in Pallas's simulation of the chip: values, gradients, races."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.masks import make_masks
from qwen2_jax.kernels.target import Target, simulated
from qwen2_jax.kernels.visibility import FAR

from attention_cases import arrays, naive
from attention_layouts import layouts
from few import FEW, slow
from tolerance import BFLOAT16, assert_no_worse

gpu = pytest.importorskip("qwen2_jax.kernels.dual_chunk_attention.gpu")
flash_gpu = pytest.importorskip("qwen2_jax.kernels.flash_attention.gpu")
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")

HOPPER = Target("gpu", "NVIDIA H200")
ONE, THREE = (1, 137, 171, 2, 1, 64), (2, 70, 139, 2, 1, 128)  # B, T, S, N, K, H; two blocks of queries, or one
SMALL = {"block_k": 64, "stages": 2}  # so small that the ring goes round


def by_kernel(*rotated_k_v, detect_races=False, **layout):
    """The gpu implementation in the simulation. Returns (out, lse)."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the simulation of jax 0.11 has no plgpu.load")
    *rotations, k, v = rotated_k_v
    run = gpu.attend if "chunk_len" in layout else flash_gpu.flash_attention
    with simulated(HOPPER.kind, params.InterpretGPUParams(detect_races=detect_races)):
        return run(tuple(rotations), k, v, make_masks({"q": rotations[0]}, k, v, **layout), **SMALL)


@functools.partial(jax.jit, static_argnums=0)
def exactly(attend, rotations, k, v, layout):
    """By the definition in float32, the inputs as they are."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), (*rotations, k, v))
    return attend(*inputs, return_lse=True, implementation="reference", **layout)


@jax.jit
def eagerly(rotations, k, v, layout):
    return naive(rotations, k, v, **layout)


def assert_as_good_as_eager(attend, rotations, k, v, layout):
    got = by_kernel(*rotations, k, v, **layout)
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, jnp.float32)
    exact, plain = exactly(attend, rotations, k, v, layout), eagerly(rotations, k, v, layout)
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=BFLOAT16), got, plain, exact)


@pytest.mark.slow
@settings(FEW, max_examples=3)
@given(layouts([ONE]))
def test_flash_attention_is_as_good_as_eager_bfloat16(case):
    shape, seed, layout = case
    queries, k, v, _ = arrays(seed, shape, jnp.bfloat16)
    assert_as_good_as_eager(flash_attention, queries, k, v, layout)


@settings(FEW, max_examples=2)
@given(layouts([THREE], chunks=True))
def test_dual_chunk_attention_is_as_good_as_eager_bfloat16(case):
    shape, seed, layout = case
    rotations, k, v, _ = arrays(seed, shape, jnp.bfloat16, rotations=3)
    assert_as_good_as_eager(dual_chunk_attention, rotations, k, v, layout)


def continued(shape, scale=0.1, window=FAR):
    """The queries are the last T of S tokens. All that `layouts` has, so that no other program is compiled."""
    B, T, S, *_ = shape
    at_BS = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    layout = {"q_positions_BT": at_BS[:, S - T :], "kv_positions_BS": at_BS, "window": np.full(B, window, np.int32)}
    layout |= {"q_segments_BT": np.zeros((B, T), np.int32), "kv_segments_BS": np.zeros((B, S), np.int32)}
    return layout | {"scale": np.full(B, scale, np.float32)}


@pytest.mark.parametrize("scale", [-0.3, *slow(0.0)])
def test_any_scale(scale):
    queries, k, v, _ = arrays(0, ONE, jnp.bfloat16)
    assert_as_good_as_eager(flash_attention, queries, k, v, continued(ONE, scale))


def gradients(attend, rotations, k, v, scale, weights, layout):
    """Of a weighted sum of both results, in everything that has one."""

    def total(rotations, k, v, scale):
        out, lse = attend(*rotations, k, v, scale=scale, **layout)
        return (out * weights[0]).sum(dtype=jnp.float32) + (lse * weights[1]).sum()

    *found, dscale = jax.grad(total, argnums=(0, 1, 2, 3))(rotations, k, v, scale)
    return *found, dscale / math.prod(k.shape[1:])  # the scale's is a sum over everything


@pytest.mark.slow  # quick: the backward kernel, test_attention_gpu_backward.py
def test_gradients_reach_everything():
    shape = (1, 40, 64, 2, 1, 64)
    rotations, k, v, weights = arrays(5, shape, jnp.bfloat16, rotations=3)
    layout = continued(shape, window=50) | {"chunk_len": np.full(1, 23, np.int32)}
    inputs, rest = (rotations, k, v), (layout.pop("scale"), weights, layout)
    by_definition = functools.partial(dual_chunk_attention, return_lse=True, implementation="reference")
    exact = gradients(by_definition, *jax.tree.map(lambda x: x.astype(jnp.float32), inputs), *rest)
    plain = gradients(lambda *x, **layout: naive(x[:3], *x[3:], **layout), *inputs, *rest)
    got = gradients(by_kernel, *inputs, *rest)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.bfloat16] * 5 + [jnp.float32]
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=BFLOAT16), got, plain, exact)


@pytest.mark.slow  # both kernels are compared with the definition above
def test_one_chunk_is_ordinary_attention_to_the_bit():
    (q, other, _), k, v, _ = arrays(3, ONE, jnp.bfloat16, rotations=3)
    layout = continued(ONE)
    ordinary = by_kernel(q, k, v, **layout)
    chunked = by_kernel(q, other, other, k, v, chunk_len=ONE[2], **layout)
    jax.tree.map(np.testing.assert_array_equal, chunked, ordinary)


def test_blocks_nobody_sees_are_not_read():
    """Not-a-number in every value that no block of queries may need: it would spread through any product."""
    queries, k, v, _ = arrays(2, ONE, jnp.bfloat16)
    layout = continued(ONE, window=3)
    layout["q_positions_BT"] = 130 + layout["q_positions_BT"] % 41  # of keys, the third block and the first are enough
    layout["q_positions_BT"][:, :128] -= 130
    poisoned = v.at[:, 64:128].set(jnp.nan)
    clean, got = (by_kernel(*queries, k, x, **layout) for x in (v, poisoned))
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_no_races():
    rotations, k, v, _ = arrays(4, THREE, jnp.bfloat16, rotations=3)
    layout = continued(THREE) | {"chunk_len": np.array([30, 64])}  # boundaries inside blocks and between
    by_kernel(*rotations, k, v, detect_races=True, **layout)
    assert not simulation.get_races().races_found


def test_refuses_what_it_cannot_do():
    (q,), k, v, _ = arrays(0, (1, 8, 8, 2, 1, 64), jnp.bfloat16)
    at = {"q_positions_BT": jnp.arange(8)[None], "kv_positions_BS": jnp.arange(8)[None]}
    attend = functools.partial(flash_attention, implementation="gpu", **at)
    with pytest.raises(NotImplementedError, match=r"needs a gpu, this is a cpu"):
        attend(q, k, v)
    with (
        simulated("NVIDIA A100-SXM4-80GB", params.InterpretGPUParams()),
        pytest.raises(NotImplementedError, match="hopper"),
    ):
        attend(q, k, v)
    with simulated(HOPPER.kind, params.InterpretGPUParams()):
        with pytest.raises(NotImplementedError, match="needs bfloat16, q is float32"):
            attend(q.astype(jnp.float32), k, v)
        with pytest.raises(NotImplementedError, match="needs a head width of 64 or 128, got 80"):
            attend(*(jnp.zeros((1, 8, heads, 80), jnp.bfloat16) for heads in (2, 1, 1)))
        with pytest.raises(ValueError, match="block_q=64"):
            flash_gpu.flash_attention((q,), k, v, make_masks({"q": q}, k, v, **at), block_q=64)


# ---------------------------------------------------------------------- cuDNN, which nothing here can run


def test_cudnn_refuses_what_its_flag_cannot_say():
    (q,), k, v, _ = arrays(0, (1, 8, 8, 2, 1, 64), jnp.bfloat16)
    at = {"q_positions_BT": jnp.arange(8)[None], "kv_positions_BS": jnp.arange(8)[None]}
    attend = functools.partial(flash_attention, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="needs a gpu, this is a cpu"):
        attend(q, k, v, **at)
    with simulated(HOPPER.kind, params.InterpretGPUParams()):
        with pytest.raises(NotImplementedError, match="as many queries as keys, got 4 and 8"):
            attend(q[:, :4], k, v, **at | {"q_positions_BT": jnp.arange(4)[None]})
        with pytest.raises(NotImplementedError, match="no window"):
            attend(q, k, v, window=3, **at)
        with pytest.raises(NotImplementedError, match="no window"):
            attend(q, k, v, q_segments_BT=jnp.zeros((1, 8), int), kv_segments_BS=jnp.zeros((1, 8), int), **at)
        with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
            attend(q.astype(jnp.float32), k, v, **at)
        with pytest.raises(NotImplementedError, match="real GPU"):
            attend(q, k, v, **at)


# ---------------------------------------------------------------------- what it costs


def test_dual_chunk_attention_costs_what_causal_attention_costs():
    length, heads = 131072, {"N": 28, "K": 4, "H": 128}
    plain = gpu.count_forward(1, length, length, **heads, on=HOPPER)
    blocks = length // 128
    assert plain.flops == 28 * 4 * 128 * 128**2 * blocks * (blocks + 1) // 2
    for chunk_len in (32256, 30000):  # a multiple of the block, and not
        chunked = gpu.count_forward(1, length, length, **heads, on=HOPPER, chunk_len=chunk_len)
        assert chunked.flops <= 1.03 * plain.flops
        assert chunked.hbm_bytes <= 1.03 * plain.hbm_bytes
        assert chunked.l2_bytes <= 1.03 * plain.l2_bytes
        assert plain.fast_memory_bytes < chunked.fast_memory_bytes <= 227 * 1024


def test_count_follows_the_window():
    whole, windowed = (gpu.count_forward(1, 8192, 8192, 14, 2, 64, on=HOPPER, window=window) for window in (None, 1024))
    assert 0.2 < windowed.flops / whole.flops < 0.3
