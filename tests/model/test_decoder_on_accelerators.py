# SPDX-License-Identifier: Apache-2.0
"""Every kind of layer on the kernels of every device: the model in Pallas's interpreters against the portable one.

Slow, because simulations are; test_device.py runs "sliding" on both, by `python -m benchmarks.device --small`, which
.ci/run does always.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.target import simulated

from accelerator_cases import KINDS, results
from tolerance import BFLOAT16, assert_no_worse

TPU = ("TPU v5 lite", pltpu.InterpretParams())


def gpu():
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params", reason="this jax cannot simulate GPUs")
    return "NVIDIA H200", params.InterpretGPUParams()


def test_every_kind_is_here():
    assert {"moe", "sliding", "dual chunk"} == KINDS.keys()


def compare(kind, device, implementation, dtype, floor):
    """No worse than the portable implementation in the same dtype, both measured against the definition in float32."""
    with simulated(*device):
        got = results(kind, dtype, implementation)
    portable, exact = results(kind, dtype, "xla"), results(kind, jnp.float32, "reference")
    for ours, theirs, true in zip(*map(jax.tree.leaves, (got, portable, exact)), strict=True):
        assert_no_worse(ours, theirs, true, floor=floor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tpu(kind):
    compare(kind, TPU, "tpu", jnp.float32, floor=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gpu(kind):
    compare(kind, gpu(), "gpu", jnp.bfloat16, floor=BFLOAT16)
