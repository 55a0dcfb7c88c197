# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of weight_only_matmul in Pallas's simulation of the chip, what it refuses, and what it counts."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.chip_limits import CHIPS
from qwen2_jax.kernels.target import simulated
from qwen2_jax.kernels.weight_only_matmul import reference, weight_only_matmul

from few import slow
from integer_cases import drawn, exact
from tolerance import assert_no_worse

gpu = pytest.importorskip("qwen2_jax.kernels.weight_only_matmul.gpu")
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
simulates = pytest.mark.skipif(not hasattr(gpu.plgpu, "store"), reason="this jax's Mosaic GPU lacks plgpu.store")

KIND = CHIPS["h200"].kind
SMALL = {("hopper", "few"): {"programs": 2, "steps": 2, "stages": 2, "least_stages": 1}}
CASES = {  # rows, outputs, inputs, inputs of a group, integers, offsets
    "int4, groups of 32, more stages than the ring has": (3, 64, 1344, 32, jnp.int4, True),
}
MORE = {
    "int8, groups of 64, two tiles": (10, 128, 320, 64, jnp.int8, False),
    "int4, a scale for each output": (8, 64, 1280, 1280, jnp.int4, False),
    "int8, groups of 256": (1, 64, 1024, 256, jnp.int8, True),
    "int4, groups of 16": (5, 64, 320, 16, jnp.int4, True),
    "int8, groups of 16": (64, 64, 288, 16, jnp.int8, False),
}


@simulates
@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_it_is_the_definition(case):
    """In two parts, through a ring of two stages; and the gradient of x. No two accesses of shared memory race."""
    rows, O, I, group, values, offset = (CASES | MORE)[case]
    parts = drawn(O, I, I // group, values, offset=offset)
    x, dy = (jax.random.normal(jax.random.key(i), (rows, width), jnp.bfloat16) for i, width in ((1, I), (2, O)))
    interpret = params.InterpretGPUParams(detect_races=True)
    with pytest.MonkeyPatch.context() as patch, simulated(KIND, interpret):
        patch.setattr(gpu, "BLOCKS", SMALL)
        y, pull = jax.vjp(lambda x: weight_only_matmul(x, *parts, dtype=jnp.float32, implementation="gpu"), x)
        jax.block_until_ready(y)
    assert not simulation.get_races().races_found
    w = reference.dequantised(*parts)
    assert_no_worse(y, jnp.einsum("mi,oi->mo", x.astype(jnp.float32), w), exact(x, *parts))
    dx = jnp.einsum("mo,oi->mi", dy.astype(jnp.float32), w, precision="highest")
    assert_no_worse(pull(dy.astype(jnp.float32))[0], dx.astype(jnp.bfloat16), dx)


@pytest.mark.parametrize(
    ("rows", "O", "I", "group", "dtype", "message"),
    [
        (1, 64, 128, 32, jnp.float32, "needs x in bfloat16, got float32"),
        (65, 64, 128, 32, jnp.bfloat16, "needs 1 to 64 rows, got 65"),
        (1, 96, 128, 32, jnp.bfloat16, "needs outputs that are a multiple of 64, got 96"),
        (1, 64, 192, 96, jnp.bfloat16, "needs groups of 16, 32, 64 or a multiple of 128 inputs, got 96"),
        (1, 64, 96, 32, jnp.bfloat16, "needs inputs that are a multiple of 64 for 4 bits, got 96"),
    ],
)
def test_what_it_refuses_goes_to_xla(rows, O, I, group, dtype, message):
    parts = drawn(O, I, I // group)
    x = jnp.ones((rows, I), dtype)
    with simulated(KIND, params.InterpretGPUParams()):
        with pytest.raises(NotImplementedError, match=message):
            weight_only_matmul(x, *parts, implementation="gpu")
        weight_only_matmul(x, *parts)
    with pytest.raises(NotImplementedError, match="needs a gpu, this is a cpu"):
        weight_only_matmul(x, *parts, implementation="gpu")


def test_an_older_jax_goes_to_xla(monkeypatch):
    monkeypatch.delattr(gpu.plgpu, "store", raising=False)
    parts, x = drawn(64, 128, 4), jnp.ones((1, 128), jnp.bfloat16)
    with simulated(KIND, params.InterpretGPUParams()):
        with pytest.raises(NotImplementedError, match=r"needs jax 0.12"):
            weight_only_matmul(x, *parts, implementation="gpu")
        assert weight_only_matmul(x, *parts).shape == (1, 64)


@pytest.mark.parametrize(("O", "I"), [(18944, 3584), (3584, 18944), (8192, 29568), (152064, 8192), (3584, 3584)])
def test_counted(O, I):
    """The weight is read once and, with few rows, little else; programs fill the chip; rings fit in its shared memory.

    With 64 rows the sums of the parts are counted as if the L2 cache held none of them.
    """
    on = CHIPS["h200"].on
    for bits, group, offset in ((4, 32, True), (4, 128, False), (8, 64, False)):
        weight = O * I * bits // 8 + 4 * (1 + offset) * O * I // group
        for rows in (1, 8, 64):
            work = gpu.count(rows, O, I, I // group, on=on, bits=bits, offset=offset)
            assert weight < work.hbm_bytes < (1.12 if rows <= 8 else 2) * weight
            cut = gpu.choose_cut(on, rows, O, I, I // group, bits)
            assert cut.stages >= 3
            assert cut.memory <= gpu.SHARED_MEMORY
            assert O // gpu.ROWS * cut.parts >= 264 or I / cut.parts < 8 * gpu.DEPTH
