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


def memory(chip, rows, group, values, offset, implementation, sizes=(O, I), dtype=jnp.bfloat16):
    O, I = sizes
    scale = jax.ShapeDtypeStruct((O, I // group), jnp.float32)
    args = jax.ShapeDtypeStruct((rows, I), dtype), jax.ShapeDtypeStruct((O, I), values), scale
    args += (scale,) if offset else ()

    def product(*args):
        return weight_only_matmul(*args, implementation=implementation)

    return compile_for(chip, product, *args).memory_analysis()


QUICK = [
    ("xla", "v5e", 1, 128, jnp.int4, False),
    ("xla", "v5e", 8, 32, jnp.int4, True),
    ("tpu", "v5e", 8, 32, jnp.int4, True),
    ("tpu", "v5p", 512, 64, jnp.int4, True),
    ("tpu", "v6e", 1, 128, jnp.int8, False),
]
MORE = [
    *(("v5e", rows, group, jnp.int4, False) for rows in (64, 512, 4096) for group in (32, 128)),
    *((chip, rows, 64, jnp.int4, True) for chip in ("v5p", "v6e") for rows in (1, 8, 512)),
    *((chip, rows, 32, jnp.int8, False) for chip in ("v5e", "v6e") for rows in (1, 8, 512)),
]
EVERY = [*QUICK, *(case for name in ("xla", "tpu") for x in MORE if (case := (name, *x)) not in QUICK)]
SIZES = [(3584, 18944), (29696, 8192), (8192, 29568), (152064, 8192), (4864, 896), (896, 4864), (128, 896)]


class TestTpu:
    pytestmark = TPU_COMPILER

    @pytest.mark.parametrize(
        ("implementation", "chip", "rows", "group", "values", "offset"), [*QUICK, *slow(*EVERY[len(QUICK) :])]
    )
    def test_the_weight_stays_packed(self, implementation, chip, rows, group, values, offset):
        found = memory(chip, rows, group, values, offset, implementation)
        stored = O * I // (2 if values == jnp.int4 else 1) + O * I // group * 4 * (1 + offset)
        assert found.argument_size_in_bytes <= 1.1 * stored + rows * I * 2
        copied = 0
        if chip == "v5p" and implementation == "xla":  # copies the packed integers, and keeps the result in float32
            copied = 1.01 * O * I // 2 + 1.3 * rows * O * 4
        assert found.temp_size_in_bytes < WEIGHT / 100 + copied

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 8, 512, 4096])
    @pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
    def test_the_kernel_at_the_sizes_of_the_family(self, chip, rows):
        """And with x in float32. It keeps four copies of eight rows of x and their result, and XLA copies these."""
        for O, I in SIZES:
            for group, values, offset in ((32, jnp.int4, True), (128, jnp.int8, False)):
                found = memory(chip, rows, group, values, offset, "tpu", (O, I))
                assert found.temp_size_in_bytes <= 8 * 2 * 2.2 * (4 * I + O) + 2**19
            memory(chip, rows, I, jnp.int4, False, "tpu", (O, I), jnp.float32)


class TestGpu:
    pytestmark = GPU_COMPILER

    @pytest.mark.parametrize(
        ("implementation", "rows"), [("xla", 1), ("gpu", 8), *slow(("xla", 4), ("xla", 8), ("gpu", 1), ("gpu", 64))]
    )
    def test_the_weight_stays_packed(self, implementation, rows):
        """With "xla" up to eight rows; more rows dequantise it, at the cost of writing and reading it once more."""
        found = memory("h100", rows, 128, jnp.int4, False, implementation)
        assert found.argument_size_in_bytes <= 1.1 * (O * I // 2 + O * I // 128 * 4)
        # Of each group, and the scales the other way round; or of all groups, of rows filled up to eight.
        sums = (rows + 1) * O * I // 128 * 4 if implementation == "xla" else 1.2 * max(rows, 8) * O * 4
        assert found.temp_size_in_bytes <= 1.01 * sums

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [1, 64])
    @pytest.mark.parametrize("chip", ["h100", "h200"])
    def test_the_kernel_at_the_sizes_of_the_family(self, chip, rows):
        """What it keeps is the sums of a few parts of the inputs, and x."""
        for O, I in SIZES:
            for group, values, offset in ((32, jnp.int4, True), (128, jnp.int8, False), (16, jnp.int4, True)):
                found = memory(chip, rows, group, values, offset, "gpu", (O, I))
                assert found.argument_size_in_bytes <= 1.01 * (
                    O * I // (2 if values == jnp.int4 else 1) + O * I // group * 4 * (1 + offset) + rows * I * 2
                )
                assert found.temp_size_in_bytes <= 1.1 * max(8, rows) * (8 * O * 4 + 2 * I * 4)
