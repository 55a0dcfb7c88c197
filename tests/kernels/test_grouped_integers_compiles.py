# SPDX-License-Identifier: Apache-2.0
"""The compilers of TPUs and GPUs take experts of integers at the sizes of the 57B-A14B, and copy no stack of them."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.grouped_matmul import Scaled, grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.grouped_matmul.integers import FEW, WIDENED
from qwen2_jax.kernels.grouped_matmul.shapes import INTEGER_SHAPES

from ahead_of_time import GPU_COMPILER, TPU_COMPILER, compile_for
from few import slow


def stored(E, F, D, group, bits, offset):
    values = jax.ShapeDtypeStruct((E, F, D), jnp.int4 if bits == 4 else jnp.int8)
    scale = jax.ShapeDtypeStruct((E, F, D // group) if group else (E, F), jnp.float32)
    return Scaled(values, scale, scale if offset else None)


def layer(implementation, x, gate, up, down, sizes):
    """What a sparse layer does with rows that are sorted already."""
    h = grouped_swiglu(x, gate, up, sizes, implementation=implementation)
    return grouped_matmul(h, down, sizes, transpose_w=True, implementation=implementation)


def check(chip, implementation, name, *, gradient=False):
    """Arguments are packed. What lies beside them is rows and sums, and of many rows the matrices of one turn."""
    shape = INTEGER_SHAPES[name]
    M, E, D, F, *form = (shape[key] for key in ("M", "E", "D", "F", "group", "bits", "offset"))
    gate, down = stored(E, F, D, *form), stored(E, D, F, *form)
    run = lambda *args: layer(implementation, *args)
    if gradient:
        run = lambda x, *args: jax.vjp(lambda x: layer(implementation, x, *args), x)[1](x)
    x = jax.ShapeDtypeStruct((M, D), jnp.bfloat16)
    compiled = compile_for(chip, run, x, gate, gate, down, jax.ShapeDtypeStruct((E,), jnp.int32))
    found, bits = compiled.memory_analysis(), form[1]
    factors = 4 * sum(s.size for w in (gate, gate, down) for s in w[1:] if s is not None)
    if chip in ("v5e", "v5p", "v6e") and form[0] is None:
        factors = 0
    assert found.argument_size_in_bytes <= 1.05 * (3 * E * D * F * bits // 8 + factors + 2 * M * D) + 2**20
    rows = M + 64 * min(M, E)  # with those that fill blocks up
    beside = rows * (2 * D + 4 * (2 * F + D))
    if gradient or M > FEW * E:
        beside = WIDENED + (12 if gradient else 6) * 2 * M * F
    assert found.temp_size_in_bytes <= beside + 2**22


def cases(chips, *quick):
    """The 57B-A14B on every chip, and sizes that are multiples of less, the other model's, on the first."""
    every = [(chip, name) for name in INTEGER_SHAPES for chip in (chips if "57b" in name else chips[:1])]
    return pytest.mark.parametrize(("chip", "name"), [*quick, *slow(*(case for case in every if case not in quick))])


class TestTpu:
    pytestmark = TPU_COMPILER

    @cases(
        ("v5e", "v5p", "v6e"), ("v5e", "qwen2-57b-a14b gptq-int4 one token"), ("v6e", "qwen2-57b-a14b q4_k prefill 4k")
    )
    def test_no_stack_is_copied(self, chip, name):
        check(chip, "tpu", name)

    @pytest.mark.slow
    def test_gradient_of_x(self):
        check("v5p", "tpu", "qwen2-57b-a14b int4 prefill 4k", gradient=True)


class TestGpu:
    pytestmark = GPU_COMPILER

    @cases(  # one instruction set, one number of multiprocessors: both chips get the same code
        ("h200",), ("h100", "qwen2-57b-a14b gptq-int4 one token"), ("h200", "qwen2-57b-a14b int8 prefill 4k")
    )
    def test_no_stack_is_copied(self, chip, name):
        check(chip, "gpu", name)

    @pytest.mark.slow
    def test_gradient_of_x(self):
        check("h200", "gpu", "qwen2-57b-a14b int4 prefill 4k", gradient=True)
