# SPDX-License-Identifier: Apache-2.0
"""Matrix products with a weight stored as small integers in groups of inputs: w = scale * q - offset.

Only the weight is quantised; activations keep their dtype ("weight-only" quantisation, W4A16 and W8A16).

M rows, I inputs, O outputs, G groups of I / G neighbouring inputs.
"""

import jax.numpy as jnp

from ..dispatch import dispatch, late
from . import reference, xla

__all__ = ["IMPLEMENTATIONS", "weight_only_matmul"]

IMPLEMENTATIONS = {  # fastest first
    "gpu": late(f"{__name__}.gpu", "weight_only_matmul", "gpu"),
    "tpu": late(f"{__name__}.tpu", "weight_only_matmul", "tpu"),
    "xla": xla.weight_only_matmul,
    "reference": reference.weight_only_matmul,
}


def weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG=None, *, dtype=None, implementation=None):
    """x w^T with w[o, i] = scale[o, g] * values[o, i] - offset[o, g], g the group of input i: [M, O] in `dtype`.

    Args:
        x_MI: float; there may be several dimensions of rows.
        values_OI: int4 or int8. scale_OG, offset_OG: float32; no offset where it is None.
        dtype: of the result, by default x's. Sums are float32.
        implementation: "tpu", "gpu" (kernels), "xla" (by the form that each platform fuses), "reference" (from the
            definition), or None for the first that takes the inputs.

    Differentiable in x alone: the weight is a constant.

    Raises:
        ValueError: shapes or dtypes do not fit, or an unknown implementation.
        NotImplementedError: the named implementation does not take these inputs.
    """
    O, I = values_OI.shape
    if x_MI.shape[-1] != I or scale_OG.shape[0] != O or I % max(1, scale_OG.shape[1]):
        raise ValueError(
            f"x [..., I], values [O, I] and scale [O, G] must fit and G divide I; got {x_MI.shape}, "
            f"{values_OI.shape} and {scale_OG.shape}"
        )
    if offset_OG is not None and offset_OG.shape != scale_OG.shape:
        raise ValueError(f"offset must have the shape of scale, {scale_OG.shape}, got {offset_OG.shape}")
    if values_OI.dtype not in (jnp.int4, jnp.int8):
        raise ValueError(f"values must be int4 or int8, got {values_OI.dtype}")
    arguments = x_MI, values_OI, scale_OG, offset_OG
    return dispatch("weight_only_matmul", IMPLEMENTATIONS, implementation, *arguments, dtype=dtype or x_MI.dtype)
