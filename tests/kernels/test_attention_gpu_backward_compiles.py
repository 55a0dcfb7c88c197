# SPDX-License-Identifier: Apache-2.0
"""The gradients of attention, compiled for Hopper GPUs that are not here, at the shapes that models are trained at."""

import functools

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.dual_chunk_attention.shapes import SHAPES as DUAL_CHUNK
from qwen2_jax.kernels.flash_attention.shapes import SHAPES as FLASH
from qwen2_jax.kernels.masks import Masks, Tokens

from ahead_of_time import GPU_COMPILER, compile_for
from few import slow

gpu = pytest.importorskip("qwen2_jax.kernels.dual_chunk_attention.gpu_backward")
pytestmark = GPU_COMPILER

# Every kind of heads once: qwen2-57b-a14b has those of qwen2-7b.
TRAINED = [name for name in FLASH if name.endswith(" train") and "57b" not in name]
TRAINED += [name for name in DUAL_CHUNK if name.endswith("train 128k") and "57b" not in name]


def compile_backward(chip, B, T, S, N, K, H, chunk_len=None, packed=False):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = lambda length: Tokens(*[array(B, length, dtype=jnp.int32)] * 2) if packed else Tokens(at(length), None)
    at = lambda length: array(B, length, dtype=jnp.int32)
    numbers = array(B, dtype=jnp.int32)
    rule, scale = (numbers if packed else None, numbers if chunk_len else None), array(B, dtype=jnp.float32)
    masks = Masks(tokens(T), tokens(S), *rule, scale)
    q, k, per_row = array(B, T, N, H), array(B, S, K, H), array(B, T, N, dtype=jnp.float32)
    inputs = (q,) * (3 if chunk_len else 1), k, k, masks, q, per_row, q, per_row
    return compile_for(chip, functools.partial(gpu.backward, interpret=False), *inputs)


QUICK = ("qwen2-0.5b train", "qwen2-7b train 128k")  # both widths of heads; both numbers of rotations


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name)[0] for name in TRAINED])
def test_compiles_for_h200(name):
    shape = (FLASH | DUAL_CHUNK)[name]
    compiled = compile_backward("h200", **shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30  # nothing grows with the square of the length


@pytest.mark.parametrize(("N", "K", "H", "chunk_len"), [*slow((14, 2, 64, None)), (28, 4, 128, 500)])
def test_compiles_for_h100_with_documents_windows_and_lengths_of_no_multiple(N, K, H, chunk_len):
    compile_backward("h100", 2, 1001, 1333, N, K, H, chunk_len, packed=True)
