# SPDX-License-Identifier: Apache-2.0
"""Every operation at every real shape, traced without computing anything: shapes, dtypes, and gradients of training."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.decode_attention import decode_attention
from qwen2_jax.kernels.decode_attention import shapes as decode_shapes
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.dual_chunk_attention import shapes as dual_chunk_shapes
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.flash_attention import shapes as flash_shapes
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.grouped_matmul import shapes as grouped_shapes
from qwen2_jax.kernels.weight_only_matmul import shapes as weight_only_shapes
from qwen2_jax.kernels.weight_only_matmul import weight_only_matmul


def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(name, f, *arguments):
    """The abstract result of f; where `name` is a shape of training, its gradients must look like the arguments."""
    if "train" in name:
        total = lambda *x: f(*x).astype(jnp.float32).sum()
        gradients = jax.eval_shape(jax.grad(total, argnums=tuple(range(len(arguments)))), *arguments)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in arguments]
    return jax.eval_shape(f, *arguments)


@pytest.mark.parametrize("name", flash_shapes.SHAPES)
def test_flash_attention(name):
    B, T, S, N, K, H = flash_shapes.SHAPES[name].values()
    at = {"q_positions_BT": jnp.zeros((B, T), jnp.int32), "kv_positions_BS": jnp.zeros((B, S), jnp.int32)}
    q, k = abstract(B, T, N, H), abstract(B, S, K, H)
    out = trace(name, lambda q, k, v: flash_attention(q, k, v, implementation="xla", **at), q, k, k)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize("name", dual_chunk_shapes.SHAPES)
def test_dual_chunk_attention(name):
    chunk_len, B, T, S, N, K, H = dual_chunk_shapes.SHAPES[name].values()
    at = {"q_positions_BT": jnp.zeros((B, T), jnp.int32), "kv_positions_BS": jnp.zeros((B, S), jnp.int32)}
    q, k = abstract(B, T, N, H), abstract(B, S, K, H)
    f = lambda *x: dual_chunk_attention(*x, chunk_len=chunk_len, implementation="xla", **at)
    out = trace(name, f, q, q, q, k, k)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize("name", decode_shapes.SHAPES)
def test_decode_attention(name):
    B, T, S, N, K, H = decode_shapes.SHAPES[name].values()
    at = {"q_positions_BT": jnp.zeros((B, T), jnp.int32), "chunk_len": 32256, "implementation": "xla"}
    q, k = abstract(B, T, N, H), abstract(B, K, S, H)
    out = jax.eval_shape(lambda q, k: decode_attention(q, q, q, k, k, **at), q, k)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize("name", grouped_shapes.SHAPES)
def test_grouped_matmul(name):
    M, E, D, F = grouped_shapes.SHAPES[name].values()
    sizes, gate, down = jnp.zeros(E, jnp.int32), abstract(E, F, D), abstract(E, D, F)
    hidden = trace(
        name, lambda x, g, u: grouped_swiglu(x, g, u, sizes, implementation="xla"), abstract(M, D), gate, gate
    )
    assert hidden.shape == (M, F)
    down_projection = lambda h, w: grouped_matmul(h, w, sizes, transpose_w=True, implementation="xla")
    assert trace(name, down_projection, hidden, down).shape == (M, D)


@pytest.mark.parametrize("name", weight_only_shapes.SHAPES)
def test_weight_only_matmul(name):
    M, O, I, group, bits, offset = weight_only_shapes.SHAPES[name].values()
    scale = abstract(O, I // group, dtype=jnp.float32)
    parts = abstract(O, I, dtype=jnp.int4 if bits == 4 else jnp.int8), scale, *([scale] if offset else [])
    out = jax.eval_shape(lambda *x: weight_only_matmul(*x, implementation="xla"), abstract(M, I), *parts)
    assert (out.shape, out.dtype) == ((M, O), jnp.bfloat16)
