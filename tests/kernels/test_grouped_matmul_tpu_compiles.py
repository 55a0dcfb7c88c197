# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler takes every grouped product at the sizes of the family's mixtures of experts."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.grouped_matmul.shapes import SHAPES

from ahead_of_time import TPU_COMPILER, compile_for
from few import slow

pytestmark = TPU_COMPILER


def arrays(M, E, D, F, dtype, down=True):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    weights = of(E, F, D), of(E, F, D), of(E, D, F) if down else of(E, F, D)
    return of(M, D), *weights, jax.ShapeDtypeStruct((E,), jnp.int32)


def experts(x, gate, up, down, group_sizes):
    """What a sparse layer does with rows that are sorted already."""
    h = grouped_swiglu(x, gate, up, group_sizes, implementation="tpu")
    return grouped_matmul(h, down, group_sizes, transpose_w=True, implementation="tpu")


def with_gradients(x, gate, up, down, group_sizes):
    y, pull = jax.vjp(lambda *a: experts(*a, group_sizes), x, gate, up, down)
    return y, pull(y)


def kernels_in(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


CHIPS = ("v5e", "v5p", "v6e")
CASES = [(chip, name) for name in SHAPES for chip in CHIPS]
QUICK = {  # one of each chip forward, one backward; the last test has a backward pass for another chip
    *(("v5e", "qwen2-57b-a14b one token"), ("v5e", "qwen1.5-moe-a2.7b train 16k")),
    *(("v5p", "qwen1.5-moe-a2.7b prefill 512"), ("v6e", "qwen2-57b-a14b batch of 64")),
}


def of(training):
    """Chips and shapes of training, or the others."""
    cases = [case for case in CASES if ("train" in case[1]) == training]
    return pytest.mark.parametrize(("chip", "name"), [case if case in QUICK else slow(case)[0] for case in cases])


@of(training=False)
def test_inference(chip, name):
    M, E, D, F = (SHAPES[name][x] for x in "MEDF")
    assert kernels_in(compile_for(chip, experts, *arrays(M, E, D, F, jnp.bfloat16))) == 2


@of(training=True)
def test_training(chip, name):
    M, E, D, F = (SHAPES[name][x] for x in "MEDF")
    compiled = compile_for(chip, with_gradients, *arrays(M, E, D, F, jnp.bfloat16))
    assert kernels_in(compiled) == 2 + 2 + 3  # forward; gradients of the rows; gradients of three matrices


def test_float32_and_sizes_that_are_multiples_of_nothing():
    compile_for("v5e", with_gradients, *arrays(37, 5, 200, 300, jnp.float32))

    def other_layout(x, w, group_sizes):
        y, pull = jax.vjp(lambda *a: grouped_matmul(*a, group_sizes, implementation="tpu"), x, w)
        return y, pull(y)

    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    compile_for("v5e", other_layout, of(37, 200), of(5, 200, 300), jax.ShapeDtypeStruct((5,), jnp.int32))
    compile_for("v6e", other_layout, of(4096, 2048), of(60, 2048, 1408), jax.ShapeDtypeStruct((60,), jnp.int32))
