# SPDX-License-Identifier: Apache-2.0
"""decode_attention's Hopper kernel through the real compiler: the sizes of every Qwen2, every form of the cache."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.decode_attention import decode_attention
from qwen2_jax.kernels.decode_attention.shapes import SHAPES

from ahead_of_time import GPU_COMPILER, compile_for
from few import slow

pytestmark = GPU_COMPILER

FORMS = {
    "pages of 64": {"page": 64},
    "pages of 16": {"page": 16},
    "int8": {"int8": True},
    "int8 in pages of 128": {"page": 128, "int8": True},
    "chunks": {"chunked": True},
    "chunks, a share of the slots": {"chunked": True, "share": True},
    "chunks, int8 in pages of 32": {"chunked": True, "page": 32, "int8": True},
}
DISTINCT = {tuple(shape.values()): name for name, shape in SHAPES.items()}  # two models have the same heads
# Both widths of heads, one query and several; the others are the same kernel in other numbers of programs.
QUICK = ("qwen2-72b verify 4k",)  # the narrow heads: in the forms below
SIZES = [
    pytest.param(shape, id=name, marks=() if name in QUICK else pytest.mark.slow) for shape, name in DISTINCT.items()
]


def compile_form(chip, shape, *, page=None, int8=False, chunked=False, share=False):
    B, T, S, N, K, H = shape
    array = jax.ShapeDtypeStruct
    k = array((B * (S // page), K, page, H) if page else (B, K, S, H), jnp.int8 if int8 else jnp.bfloat16)
    arrays = {"q": array((B, T, N, H), jnp.bfloat16), "k": k, "v": k, "q_positions_BT": array((B, T), jnp.int32)}
    arrays["window"] = array((B,), jnp.int32)
    if page:
        arrays["block_table_BP"] = array((B, S // page), jnp.int32)
    if int8:
        arrays |= dict.fromkeys(("k_scale", "v_scale"), array(k.shape[:3], jnp.float32))
    if share:
        arrays["first"] = array((), jnp.int32)
    if chunked:
        arrays["chunk_len"] = array((B,), jnp.int32)

    def call(arrays):
        q, k, v = (arrays.pop(name) for name in "qkv")
        others = (q, q) if chunked else (None, None)
        return decode_attention(q, *others, k, v, return_lse=share, implementation="gpu", **arrays)

    return compile_for(chip, call, arrays)


@pytest.mark.parametrize("shape", SIZES)
def test_every_size(shape):
    """Beside the cache there are only the partial results of the programs."""
    compiled = compile_form("h200", shape)
    B, T, S, _, K, H = shape
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes >= 4 * B * S * K * H
    assert memory.temp_size_in_bytes < (2**24 if T == 1 else 2**26)


H100, H200 = ("h100", "qwen2-0.5b batch 4k"), ("h200", "qwen2-72b verify 4k")
# Each option once, on one of the chips; slowly, all on both.
ALWAYS = {(*H100, "pages of 64"), (*H100, "chunks, int8 in pages of 32"), (*H200, "chunks, a share of the slots")}


@pytest.mark.parametrize(
    ("chip", "name", "form"),
    [(*case, form) if (*case, form) in ALWAYS else slow((*case, form))[0] for case in (H100, H200) for form in FORMS],
)
def test_every_form(chip, name, form):
    compile_form(chip, tuple(SHAPES[name].values()), **FORMS[form])
