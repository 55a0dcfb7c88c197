# SPDX-License-Identifier: Apache-2.0
"""The gradient of a product with integers, whatever multiplies forward: that of x alone, in plain XLA.

M rows, I inputs, O outputs, G groups.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .reference import dequantised


def with_gradient(product):
    """product(static, x_MI, values_OI, scale_OG, offset_OG), [M, O], made differentiable in x; `static` is hashable."""

    def forward(static, x_MI, values_OI, scale_OG, offset_OG):
        y_MO = product(static, x_MI, values_OI, scale_OG, offset_OG)
        return y_MO, (values_OI, scale_OG, offset_OG, x_MI[:0])

    differentiable = jax.custom_vjp(product, nondiff_argnums=(0,))
    differentiable.defvjp(forward, _backward)
    return differentiable


def _backward(static, residuals, dy_MO):
    """The gradient of x; the weight has none."""
    values_OI, scale_OG, offset_OG, like_x = residuals

    def product(wide, dy_MO, values_OI, scale_OG, offset_OG):
        w_OI = dequantised(values_OI, scale_OG, offset_OG).astype(wide)
        over_O = (((dy_MO.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(dy_MO.astype(wide), w_OI, over_O, preferred_element_type=jnp.float32)

    dx_MI = lax.platform_dependent(
        dy_MO, values_OI, scale_OG, offset_OG,
        cpu=partial(product, jnp.float32), default=partial(product, like_x.dtype),
    )  # fmt: skip
    return dx_MI.astype(like_x.dtype), None, None, None
