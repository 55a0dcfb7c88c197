# SPDX-License-Identifier: Apache-2.0
"""Experts of integers on Hopper in Pallas's simulation of the chip: numbers, races and what is refused."""

import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.chip_limits import CHIPS
from qwen2_jax.kernels.counts import count
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, integers
from qwen2_jax.kernels.grouped_matmul.shapes import INTEGER_FORMS, INTEGER_SHAPES
from qwen2_jax.kernels.target import simulated
from qwen2_jax.kernels.workloads import OPERATIONS, group_sizes

from few import slow
from integer_cases import check_experts, experts_of

gpu = pytest.importorskip("qwen2_jax.kernels.weight_only_matmul.gpu")
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")

KIND = CHIPS["h200"].kind
CASES = {  # rows of each expert, all rows, outputs, inputs, inputs of a group, integers, offsets, matrices
    "int4, groups of 32, an expert with two blocks": ((0, 5, 0, 11), 18, 64, 320, 32, jnp.int4, True),
}
MORE = {
    "one token, int8, a scale for each output": ((0, 1, 0, 1), 2, 64, 384, None, jnp.int8, False),
    "no rows of any expert": ((0, 0), 3, 64, 256, 64, jnp.int4, False),
    "SwiGLU, groups of 128": ((3, 0, 9), 12, 128, 384, 128, jnp.int4, False, 2),
    "SwiGLU, int8 in groups of 64": ((0, 2, 20), 24, 64, 320, 64, jnp.int8, True, 2),
}
MANY = {
    "int4, groups of 64": ((30, 0, 47), 80, 128, 320, 64, jnp.int4, True),
    "SwiGLU, int8, a scale for each output": ((20, 0, 3, 30), 60, 64, 256, None, jnp.int8, False, 2),
}
SIMULATES = pytest.mark.skipif(not hasattr(gpu.plgpu, "store"), reason="this jax's Mosaic GPU lacks plgpu.store")


@SIMULATES
@pytest.mark.parametrize("case", [*CASES, *slow(*MORE), *slow(*MANY)])
def test_it_is_the_definition(case, monkeypatch):
    """And the gradient of x, for which matrices are dequantised in several turns. No two accesses race."""
    _, _, F, D, *_ = (CASES | MORE | MANY)[case]
    monkeypatch.setattr(gpu, "BLOCKS", {("hopper", "few"): {"programs": 2, "steps": 2, "stages": 2, "least_stages": 1}})
    monkeypatch.setattr(integers, "WIDENED", 3 * F * D * 2)
    if case in MANY:
        monkeypatch.setattr(integers, "FEW", 1)
    interpret = params.InterpretGPUParams(detect_races=True)
    check_experts("gpu", lambda: simulated(KIND, interpret), *(CASES | MORE | MANY)[case])
    assert not simulation.get_races().races_found


def test_what_it_refuses_goes_to_xla(monkeypatch):
    sizes = jnp.array([1, 0])
    with simulated(KIND, params.InterpretGPUParams()):
        for F, D, group, dtype, message in (
            (64, 128, 32, jnp.float32, r"needs bfloat16 \(float32 goes to 'xla'\), got float32"),
            (96, 128, 32, jnp.bfloat16, "widths that are multiples of 64"),
            (64, 192, 96, jnp.bfloat16, "needs groups of 16, 32, 64 or a multiple of 128 inputs, got 96"),
        ):
            x, w = jnp.ones((2, D), dtype), experts_of(2, F, D, group)
            with pytest.raises(NotImplementedError, match=message):
                grouped_matmul(x, w, sizes, transpose_w=True, implementation="gpu")
            assert grouped_matmul(x, w, sizes, transpose_w=True).shape == (2, F)
        x, gate = jnp.ones((2, 128), jnp.bfloat16), experts_of(2, 64, 128, 32)
        for up in (experts_of(2, 64, 128, 64), experts_of(2, 64, 128, 32, jnp.int8), jnp.ones((2, 64, 128), x.dtype)):
            with pytest.raises(NotImplementedError, match="needs gate and up of one form"):
                grouped_swiglu(x, gate, up, sizes, implementation="gpu")
        monkeypatch.delattr(gpu.plgpu, "store", raising=False)
        with pytest.raises(NotImplementedError, match=r"needs jax 0.12"):
            grouped_matmul(x, gate, sizes, transpose_w=True, implementation="gpu")
    with pytest.raises(NotImplementedError, match="needs a gpu, this is a cpu"):
        grouped_matmul(x, gate, sizes, transpose_w=True, implementation="gpu")


@pytest.mark.parametrize("form", [*INTEGER_FORMS])
def test_counted(form):
    """A token reads the integers of eight experts and little else; more rows read all integers once until it is better
    to dequantise them. A program fits in shared memory.
    """
    for use, most in (("one token", 1.1), ("batch of 64", 1.2), ("prefill 512", 1.7), ("prefill 4k", 6)):
        shape = INTEGER_SHAPES[f"qwen2-57b-a14b {form} {use}"]
        need = OPERATIONS["grouped_weight_only"].need(shape, jnp.bfloat16, "forward")
        work = count("grouped_weight_only", "gpu", shape, group_sizes(shape), jnp.bfloat16, CHIPS["h100"])["forward"]
        assert need.hbm_bytes <= work.hbm_bytes <= most * need.hbm_bytes, use
        assert work.flops >= need.flops
        assert work.fast_memory_bytes <= CHIPS["h100"].fast_bytes
