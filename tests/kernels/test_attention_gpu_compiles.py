# SPDX-License-Identifier: Apache-2.0
"""The attention kernels for Hopper through the real compiler: the heads of every Qwen2, at the lengths in use."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.dual_chunk_attention import shapes as dual_chunk_shapes
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.flash_attention import shapes as flash_shapes

from ahead_of_time import GPU_COMPILER, compile_for
from few import slow

pytestmark = GPU_COMPILER


def distinct(shapes, quick):
    """Every shape once: two models have the same heads. Not `quick`: the same kernels in other numbers of programs."""
    once = {tuple(shape.values()): name for name, shape in reversed(shapes.items())}
    return [
        pytest.param(name, id=name, marks=() if name.endswith(quick) else pytest.mark.slow) for name in once.values()
    ]


def compile_attention(chip, name, shape):
    """The program, with the gradients of all arrays where `name` is a shape of training. Segments, windows and all."""
    B, T, S, N, K, H = (shape[x] for x in "BTSNKH")
    chunk_len = shape.get("chunk_len")
    array = jax.ShapeDtypeStruct
    q, k = array((B, T, N, H), jnp.bfloat16), array((B, S, K, H), jnp.bfloat16)
    arrays = (q, k, k) if chunk_len is None else (q, q, q, k, k)
    tokens = {f"{side}_{what}_B{x}": array((B, n), jnp.int32) for side, x, n in [("q", "T", T), ("kv", "S", S)]
              for what in ("positions", "segments")}  # fmt: skip
    numbers = {"window": array((B,), jnp.int32), "scale": array((B,), jnp.float32)}

    def attend(arrays, options):
        if chunk_len is None:
            return flash_attention(*arrays, implementation="gpu", **options)
        return dual_chunk_attention(*arrays, chunk_len=chunk_len, implementation="gpu", **options)

    def step(arrays, options):
        return jax.grad(lambda *x: attend(x, options).astype(jnp.float32).sum(), argnums=tuple(range(len(arrays))))(
            *arrays
        )

    compiled = compile_for(chip, step if "train" in name else attend, arrays, tokens | numbers)
    kernels = compiled.as_text().count('custom_call_target="mosaic_gpu')
    assert kernels == (3 if "train" in name else 1)  # the forward pass; dq; dk and dv


@pytest.mark.parametrize("name", distinct(flash_shapes.SHAPES, ("0.5b train", "-7b prefill-chunk")))
def test_flash_attention_compiles(name):
    compile_attention("h200", name, flash_shapes.SHAPES[name])


@pytest.mark.parametrize("name", distinct(dual_chunk_shapes.SHAPES, "-7b train 128k"))
def test_dual_chunk_attention_compiles(name):
    compile_attention("h200", name, dual_chunk_shapes.SHAPES[name])


@pytest.mark.parametrize("model", [*slow("qwen2-0.5b"), "qwen2-7b"])  # the two head widths
def test_compiles_for_h100(model):
    compile_attention("h100", "train", flash_shapes.SHAPES[f"{model} train"])


def test_cudnn_is_called(monkeypatch):
    """Forward and backward, with the scale that was asked for; what cuDNN makes of it only a GPU can tell."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # both ask the machine, which has neither
    monkeypatch.setattr(fused, "check_compute_capability", lambda wanted: True)
    q, k = jax.ShapeDtypeStruct((2, 512, 14, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 512, 2, 64), jnp.bfloat16)

    def total(q, k, v, with_lse):
        at = jnp.broadcast_to(jnp.arange(512), (2, 512))
        options = {"q_positions_BT": at, "kv_positions_BS": at, "return_lse": True, "implementation": "cudnn"}
        out, lse = flash_attention(q, k, v, **options)
        assert (lse.shape, lse.dtype) == ((2, 512, 14), jnp.float32)
        return out.astype(jnp.float32).sum() + (lse.sum() if with_lse else 0)

    gradients = jax.grad(total, argnums=(0, 1, 2))
    text = compile_for("h200", lambda *x: gradients(*x, False), q, k, k).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    with pytest.raises(NotImplementedError, match="no gradient of the log-sum-exp"):
        compile_for("h200", lambda *x: gradients(*x, True), q, k, k)
