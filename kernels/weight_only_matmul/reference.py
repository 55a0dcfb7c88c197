# SPDX-License-Identifier: Apache-2.0
"""The product with a dequantised weight, from the definition, in float32."""

import jax.numpy as jnp


def dequantised(values_OI, scale_OG, offset_OG):
    """float32 [O, I]."""
    O, I = values_OI.shape
    w_OGg = values_OI.reshape(O, scale_OG.shape[1], -1).astype(jnp.float32) * scale_OG[..., None]
    return (w_OGg if offset_OG is None else w_OGg - offset_OG[..., None]).reshape(O, I)


def weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG, *, dtype):
    """Returns [M, O] in `dtype`."""
    w_OI = dequantised(values_OI, scale_OG, offset_OG)
    return jnp.einsum("...i,oi->...o", x_MI.astype(jnp.float32), w_OI, precision="highest").astype(dtype)
