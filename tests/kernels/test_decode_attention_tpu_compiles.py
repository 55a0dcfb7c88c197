# SPDX-License-Identifier: Apache-2.0
"""decode_attention's TPU kernel through the TPU's own compiler, at the shapes of every Qwen2: it tiles, and it fits."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.decode_attention import decode_attention
from qwen2_jax.kernels.decode_attention.shapes import SHAPES

from ahead_of_time import TPU_COMPILER, compile_for

pytestmark = TPU_COMPILER

HEADS = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-72b", "qwen1.5-moe-a2.7b")  # 57b-a14b has the heads of 7b
USES = ("one 32k", "one 128k", "batch 4k", "verify 4k")

CASES = [
    *[("v5e", f"{model} {use}", {}) for model in HEADS for use in USES],
    *[(chip, f"{model} one 128k", {}) for chip in ("v5p", "v6e") for model in HEADS],
    *[("v5e", f"{model} one 128k", {"cache": jnp.int8, "chunked": True}) for model in HEADS],
    *[(chip, f"{model} verify 4k", {"chunked": True}) for chip in ("v5p", "v6e") for model in HEADS[::3]],
    *[("v6e", f"{model} batch 4k", {"cache": jnp.int8, "page": 128}) for model in HEADS],
    *[(chip, "qwen2-7b batch 4k", {"page": 16}) for chip in ("v5e", "v5p", "v6e")],
    *[("v5e", f"{model} one 32k", {"dtype": jnp.float32, "chunked": True}) for model in HEADS[:3]],
    ("v6e", "qwen2-72b verify 4k", {"dtype": jnp.float32, "page": 4096}),  # the cache of many layers: a page is a row
    *[
        (chip, f"{model} one 128k", {"share": True, "chunked": True})
        for chip in ("v5e", "v5p", "v6e")
        for model in HEADS[::3]
    ],
]


# One of each form, and one of each chip; the other cases are the same kernel at other sizes.
QUICK = {
    *(("v5e", "qwen2-0.5b one 32k"), ("v5p", "qwen2-1.5b one 128k"), ("v6e", "qwen2-72b one 128k")),
    *(("v5e", "qwen2-7b one 128k int8 chunked"), ("v5p", "qwen2-72b verify 4k chunked")),
    *(("v6e", "qwen2-1.5b batch 4k int8 page"), ("v5e", "qwen2-7b batch 4k page")),
    *(("v5e", "qwen2-7b one 32k float32 chunked"), ("v6e", "qwen2-0.5b one 128k share chunked")),
}


def marked(chip, name, options):
    form = [getattr(value, "__name__", key) for key, value in options.items()]
    marks = () if (chip, " ".join([name, *form])) in QUICK else pytest.mark.slow
    return pytest.param(chip, name, options, marks=marks)


def name_of(value):
    return "-".join(f"{k}:{getattr(v, '__name__', v)}" for k, v in value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize(("chip", "name", "options"), [marked(*case) for case in CASES], ids=name_of)
def test_compiles(chip, name, options):
    B, T, S, N, K, H = SHAPES[name].values()
    dtype = options.get("dtype", jnp.bfloat16)
    cache, page = options.get("cache", dtype), options.get("page")
    shape = (B, K, S, H) if page is None else (B * S // page + 1, K, page, H)
    inputs = {"k": jax.ShapeDtypeStruct(shape, cache), "v": jax.ShapeDtypeStruct(shape, cache)}
    inputs["q_positions_BT"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
    inputs["window"] = jax.ShapeDtypeStruct((B,), jnp.int32)
    if page:
        inputs["block_table_BP"] = jax.ShapeDtypeStruct((B, S // page), jnp.int32)
    if cache == jnp.int8:
        inputs |= {scale: jax.ShapeDtypeStruct(shape[:3], jnp.float32) for scale in ("k_scale", "v_scale")}
    if options.get("share"):
        inputs["first"] = jax.ShapeDtypeStruct((), jnp.int32)
    if options.get("chunked"):
        inputs["chunk_len"] = jax.ShapeDtypeStruct((B,), jnp.int32)

    def call(q, inputs):
        others = (q, q) if "chunk_len" in inputs else (None, None)
        return decode_attention(q, *others, **inputs, return_lse="first" in inputs, implementation="tpu")

    compiled = compile_for(chip, call, jax.ShapeDtypeStruct((B, T, N, H), dtype), inputs)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * memory.argument_size_in_bytes, "the cache is copied"
