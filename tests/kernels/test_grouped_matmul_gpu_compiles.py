# SPDX-License-Identifier: Apache-2.0
"""The grouped products compile for Hopper at their real shapes, in the shared memory that a multiprocessor has."""

import jax
import jax.numpy as jnp
import pytest
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.grouped_matmul.shapes import SHAPES

from ahead_of_time import GPU_COMPILER, compile_for
from few import slow

pytestmark = GPU_COMPILER


def expert_mlp(x_MD, gate_EFD, up_EFD, down_EDF, group_sizes_E):
    h_MF = grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, implementation="gpu")
    return grouped_matmul(h_MF, down_EDF, group_sizes_E, transpose_w=True, implementation="gpu")


def gradients(*arguments):
    """Products with w either way, sums side by side and one after the other, and weight gradients either way."""
    y, pull = jax.vjp(lambda *a: expert_mlp(*a, arguments[-1]), *arguments[:-1])
    return y, pull(y)


# The other shapes are the same kernels in other numbers of tiles.
QUICK = ("qwen1.5-moe-a2.7b train 16k", "qwen2-57b-a14b one token")
NAMES = [name if name in QUICK else slow(name)[0] for name in SHAPES]


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles(name):
    M, E, D, F = (SHAPES[name][x] for x in "MEDF")
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, D), (E, F, D), (E, F, D), (E, D, F))]
    arguments = [*shapes, jax.ShapeDtypeStruct((E,), jnp.int32)]
    # One instruction set, one number of multiprocessors: both chips get the same code.
    for chip in ("h100", "h200") if name == "qwen2-57b-a14b one token" else ("h200",):
        compile_for(chip, gradients if "train" in name else expert_mlp, *arguments)
