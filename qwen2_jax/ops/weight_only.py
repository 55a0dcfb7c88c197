# SPDX-License-Identifier: Apache-2.0
"""Products with weights of small integers in groups."""

import jax

from qwen2_jax.kernels import weight_only_matmul as _weight_only
from qwen2_jax.parallel import sharding


def weight_only_matmul(
    x_MI: jax.Array, values_OI: jax.Array, scale_OG: jax.Array, offset_OG: jax.Array | None, *, dtype
) -> jax.Array:
    """x w^T with w = scale * values - offset by groups of inputs: [M, O] in `dtype`; see kernels/weight_only_matmul.

    On a mesh of several devices it is plain XLA ("xla"), which XLA divides as it divides other products; it would
    gather the weight for a kernel.
    """
    name = None if sharding.current_mesh() is None else "xla"
    return _weight_only.weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG, dtype=dtype, implementation=name)
