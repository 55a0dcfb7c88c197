# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of weight_only_matmul in Pallas's interpreter, what they refuse, and what they count."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.chip_limits import CHIPS
from qwen2_jax.kernels.target import simulated
from qwen2_jax.kernels.weight_only_matmul import reference, tpu, weight_only_matmul

from few import slow
from integer_cases import drawn, exact
from tolerance import assert_no_worse

SMALL = {("*", "tpu, few"): {"step_bytes": 1}, ("*", "tpu, many"): {"rows": 128, "outputs": 256}}
KINDS = {name: CHIPS[name].kind for name in ("v5e", "v5p", "v6e")}


def check(rows, O, I, group, values, offset, dtype, **interpreter):
    """The product and the gradient of x, in small blocks."""
    parts = drawn(O, I, I // group, values, offset=offset)
    x, dy = (jax.random.normal(jax.random.key(i), (rows, width), dtype) for i, width in ((1, I), (2, O)))
    with pytest.MonkeyPatch.context() as patch, simulated(KINDS["v5e"], pltpu.InterpretParams(**interpreter)):
        patch.setattr(tpu, "BLOCKS", SMALL)
        patch.setattr(tpu, "SHORTEST", 1)
        patch.setattr(tpu, "DEPTH", (128, 256))
        y, pull = jax.vjp(lambda x: weight_only_matmul(x, *parts, dtype=jnp.float32, implementation="tpu"), x)
    w = reference.dequantised(*parts).astype(dtype).astype(jnp.float32)  # rounded to x's dtype, as plain code does
    assert_no_worse(y, jnp.einsum("mi,oi->mo", x, w, precision="highest"), exact(x, *parts))
    dx = jnp.einsum("mo,oi->mi", dy.astype(jnp.float32), reference.dequantised(*parts), precision="highest")
    assert_no_worse(pull(dy.astype(jnp.float32))[0], dx.astype(dtype), dx)


CASES = {  # rows, outputs, inputs, inputs of a group, integers, offsets, dtype of x
    "few rows, groups of 32": (1, 200, 256, 32, jnp.int4, True, jnp.bfloat16),
    "many rows, groups of 64": (72, 264, 256, 64, jnp.int4, True, jnp.bfloat16),
}
MORE = {  # 128 groups are stored as [O, G], other numbers as [G, O]
    "few rows, a scale for each output": (3, 128, 384, 384, jnp.int8, False, jnp.bfloat16),
    "few rows, 128 groups, float32": (9, 128, 2048, 16, jnp.int4, True, jnp.float32),
    "few rows, groups of 128": (8, 384, 256, 128, jnp.int4, False, jnp.bfloat16),
    "few rows, groups of 1024": (8, 128, 2048, 1024, jnp.int8, True, jnp.bfloat16),
    "many rows, groups of 128, float32": (136, 200, 256, 128, jnp.int8, False, jnp.float32),
    "many rows, 128 groups": (20, 256, 2048, 16, jnp.int8, True, jnp.bfloat16),
    "many rows, 136 groups": (24, 128, 2176, 16, jnp.int4, True, jnp.bfloat16),
    "several blocks of rows": (300, 520, 384, 32, jnp.int4, True, jnp.bfloat16),
}


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_it_is_the_definition(case):
    check(*(CASES | MORE)[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_before_it_is_there(case):
    check(*CASES[case], detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("I", "group", "dtype", "message"),
    [
        (192, 64, jnp.bfloat16, "needs inputs that are a multiple of 128, got 192"),
        (384, 96, jnp.bfloat16, "needs groups of 16, 32, 64 or a multiple of 128 inputs, got 96"),
        (128, 8, jnp.bfloat16, "needs groups of 16, 32, 64 or a multiple of 128 inputs, got 8"),
        (128, 32, jnp.float16, "needs x in bfloat16 or float32, got float16"),
    ],
)
def test_what_it_refuses_goes_to_xla(I, group, dtype, message):
    parts = drawn(16, I, I // group)
    x = jnp.ones((2, I), dtype)
    with simulated(KINDS["v5e"], pltpu.InterpretParams()):
        with pytest.raises(NotImplementedError, match=message):
            weight_only_matmul(x, *parts, implementation="tpu")
        weight_only_matmul(x, *parts)
    with pytest.raises(NotImplementedError, match="needs a tpu, this is a cpu"):
        weight_only_matmul(x, *parts, implementation="tpu")


SHAPES = [(18944, 3584), (3584, 18944), (8192, 29568), (152064, 8192)]


@pytest.mark.parametrize("chip", KINDS)
def test_counted(chip):
    """Few rows read the weight once and little else. Many rows reach the chip's balance of products and bytes."""
    on = CHIPS[chip].on
    for O, I in SHAPES:
        for bits, group, offset in ((4, 32, True), (4, 128, False), (8, 64, False)):
            weight = O * I * bits // 8 + 4 * (1 + offset) * O * I // group
            for rows in (1, 8):
                work = tpu.count(rows, O, I, I // group, on=on, bits=bits, offset=offset)
                assert weight < work.hbm_bytes < 1.05 * weight
            work = tpu.count(4096, O, I, I // group, on=on, bits=bits, offset=offset)
            assert 2 * 4096 * O * I <= work.flops < 1.08 * 2 * 4096 * O * I
            assert CHIPS[chip].seconds(work.flops, work.hbm_bytes)[1] == "compute"
            assert work.fast_memory_bytes < 0.7 * CHIPS[chip].fast_bytes
