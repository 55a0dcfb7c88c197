# SPDX-License-Identifier: Apache-2.0
"""The TPU attention kernels through the real compiler, for chips that are not here: forward and backward, real shapes.

A few of them always, every model on every chip with `-m tpu_compiler`. Long sequences are compiled for one kv head, as
tensor parallelism leaves them to a chip: all heads of the largest model would not fit its memory.
"""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.dual_chunk_attention.shapes import SHAPES as DUAL_CHUNK
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.flash_attention.shapes import SHAPES as FLASH

from ahead_of_time import TPU_COMPILER, TPUS, compile_for
from few import slow

pytestmark = TPU_COMPILER

ALWAYS = {("v5e", "qwen2-7b train"), ("v5p", "qwen2-7b prefill-chunk 128k"), ("v6e", "qwen2-0.5b prefill")}
CASES = [(chip, name) for name in [*FLASH, *DUAL_CHUNK] for chip in TPUS]


def compile_step(chip, shape, *, dtype=jnp.bfloat16, packed=False, implementation="tpu"):
    """Results and all gradients of one call; packed: with segments, a window and a given scale."""
    B, T, S, N, K, H = (shape[x] for x in "BTSNKH")
    chunk_len = shape.get("chunk_len")
    queries = (jax.ShapeDtypeStruct((B, T, N, H), dtype),) * (1 if chunk_len is None else 3)
    kv = jax.ShapeDtypeStruct((B, S, K, H), dtype)
    q_at, kv_at, number = (jax.ShapeDtypeStruct(dims, jnp.int32) for dims in ((B, T), (B, S), (B,)))
    cotangents = queries[0], jax.ShapeDtypeStruct((B, T, N), jnp.float32)

    def step(queries, k, v, q_at, kv_at, number, cotangents):
        layout = {
            "q_positions_BT": q_at,
            "kv_positions_BS": kv_at,
            "return_lse": True,
            "implementation": implementation,
        }
        if packed:
            layout |= {"q_segments_BT": q_at, "kv_segments_BS": kv_at, "window": number, "scale": 1 / number}

        def attend(queries, k, v):
            if chunk_len is None:
                return flash_attention(*queries, k, v, **layout)
            return dual_chunk_attention(*queries, k, v, chunk_len=chunk_len, **layout)

        results, pull = jax.vjp(attend, queries, k, v)
        return results, pull(cotangents)

    compiled = compile_for(chip, step, queries, kv, kv, q_at, kv_at, number, cotangents)
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow, id=f"{case[0]} {case[1]}")
        for case in CASES
    ],
)
def test_compiles(chip, name):
    shape = (FLASH | DUAL_CHUNK)[name]
    if name in DUAL_CHUNK:
        shape = shape | {"N": shape["N"] // shape["K"], "K": 1}
    compile_step(chip, shape, packed="train" in name)


@pytest.mark.slow
@pytest.mark.parametrize("chip", TPUS)
def test_float32_compiles(chip):
    compile_step(chip, FLASH["qwen2-7b prefill"], dtype=jnp.float32)


@pytest.mark.parametrize("chip", slow("v5e", "v5p", "v6e"))  # jax's kernel
def test_splash_compiles(chip):
    compile_step(chip, FLASH["qwen2-7b train"], implementation="splash")
