# SPDX-License-Identifier: Apache-2.0
"""Which products with integers in groups are kernels: those of one device. On a mesh XLA divides its own."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType
from qwen2_jax.kernels.target import simulated

from integer_cases import drawn
from qwen2_jax import ops
from qwen2_jax.parallel import sharding


@pytest.mark.parametrize(("devices", "kernel"), [(1, True), (4, False)])
def test_a_kernel_on_one_device_and_xla_on_a_mesh(devices, kernel):
    x, parts = jnp.ones((2, 128), jnp.bfloat16), drawn(128, 128, 4)

    def product(x):
        return ops.weight_only_matmul(x, *parts, dtype=jnp.bfloat16)

    mesh = AbstractMesh((devices,), ("tensor",), axis_types=(AxisType.Auto,))
    with simulated("TPU v5 lite", pltpu.InterpretParams()):
        traced = jax.make_jaxpr(sharding.on(mesh, product))(x)
    assert ("weight_only_few" in str(traced)) == kernel
