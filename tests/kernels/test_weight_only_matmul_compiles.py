# SPDX-License-Identifier: Apache-2.0
"""What the compilers of TPUs and GPUs make of products with integers: bytes read, and no weight written to memory."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.weight_only_matmul import weight_only_matmul

from ahead_of_time import GPU_COMPILER, TPU_COMPILER, compile_for
from few import slow

O, I = 18944, 3584  # gate and up of the 7B
WEIGHT = O * I * 2  # bytes of it in bfloat16


def memory(chip, rows, group, values, offset, implementation):
    scale = jax.ShapeDtypeStruct((O, I // group), jnp.float32)
    args = jax.ShapeDtypeStruct((rows, I), jnp.bfloat16), jax.ShapeDtypeStruct((O, I), values), scale
    args += (scale,) if offset else ()

    def product(*args):
        return weight_only_matmul(*args, implementation=implementation)

    return compile_for(chip, product, *args).memory_analysis()


CASES = [("v5e", 1, 128, jnp.int4, False), ("v5e", 8, 32, jnp.int4, True)]
MORE = [
    *(("v5e", rows, group, jnp.int4, False) for rows in (64, 512, 4096) for group in (32, 128)),
    *((chip, rows, 64, jnp.int4, True) for chip in ("v5p", "v6e") for rows in (1, 8, 512)),
    *((chip, rows, 32, jnp.int8, False) for chip in ("v5e", "v6e") for rows in (1, 8, 512)),
]


@pytest.mark.parametrize(("chip", "rows", "group", "values", "offset"), [*CASES, *slow(*MORE)])
@pytest.mark.parametrize("implementation", ["xla"])
class TestTpu:
    pytestmark = TPU_COMPILER

    def test_the_weight_stays_packed(self, chip, rows, group, values, offset, implementation):
        found = memory(chip, rows, group, values, offset, implementation)
        stored = O * I // (2 if values == jnp.int4 else 1) + O * I // group * 4 * (1 + offset)
        assert found.argument_size_in_bytes <= 1.1 * stored + rows * I * 2
        copied = 0
        if chip == "v5p":  # its compiler copies the packed integers, and keeps the result in float32 and a part of it
            copied = 1.01 * O * I // 2 + 1.3 * rows * O * 4
        assert found.temp_size_in_bytes < WEIGHT / 100 + copied


@pytest.mark.parametrize("rows", [1, *slow(4, 8)])
class TestGpu:
    pytestmark = GPU_COMPILER

    def test_the_weight_stays_packed(self, rows):
        """Up to eight rows; more rows dequantise it, at the cost of writing and reading it once more."""
        found = memory("h100", rows, 128, jnp.int4, False, "xla")
        assert found.argument_size_in_bytes <= 1.1 * (O * I // 2 + O * I // 128 * 4)
        assert found.temp_size_in_bytes <= 1.2 * rows * O * I // 128 * 4  # the partial sums
