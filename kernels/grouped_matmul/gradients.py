# SPDX-License-Identifier: Apache-2.0
"""The gradients of grouped products, which are grouped products again: the same for every implementation.

With y = x w[e] for the rows of expert e, dx = dy w[e]^T is the same operation with the matrices the other way round,
and dw[e] = x^T dy over the expert's rows. For silu(x gate^T) * (x up^T), g and u are kept: making them again would be
two more products on top of the backward pass's four.

M rows sorted by expert, E experts, D width in, F width out; A and C the widths of the factors of a weight's gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """Matrices of small integers with float32 factors: constants, which have no gradient.

    values: int8 or int4 [E, F, D]. scale: [E, F], of outputs; or [E, F, G], of groups of D / G neighbouring inputs,
    perhaps with an offset of that shape: matrix = scale * values - offset.
    """

    values: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None

    @property
    def shape(self):
        return self.values.shape

    @property
    def ndim(self):
        return self.values.ndim

    @property
    def by_output(self) -> bool:
        """Whether the factors can be applied to the outputs of a product."""
        return self.scale.ndim == 2

    def dequantised(self, dtype):
        """The matrices, or what is left of one of them after slicing: [..., F, D]."""
        if self.scale.ndim < self.values.ndim:
            return (self.values * self.scale[..., None]).astype(dtype)
        in_groups = self.values.reshape(*self.scale.shape, -1).astype(jnp.float32) * self.scale[..., None]
        in_groups = in_groups if self.offset is None else in_groups - self.offset[..., None]
        return in_groups.reshape(self.values.shape).astype(dtype)


def rows_of_experts(table_EF, group_sizes_E, rows):
    """The entry of each row's expert, [rows, F]; for rows of no expert any."""
    expert_M = jnp.sum(jnp.arange(rows)[:, None] >= jnp.cumsum(group_sizes_E), axis=1)
    return table_EF[jnp.minimum(expert_M, len(group_sizes_E) - 1)]


def _towards_input(dy_MF, w, group_sizes_E):
    """(dy, w) whose product is the gradient of x: factors of outputs go to dy, for which they are factors of inputs."""
    if not isinstance(w, Scaled) or not w.by_output:
        return dy_MF, w
    scale_MF = rows_of_experts(w.scale, group_sizes_E, len(dy_MF))
    return (dy_MF.astype(jnp.float32) * scale_MF).astype(dy_MF.dtype), w.values


def with_gradients(products, weight_gradient):
    """(matmul, swiglu), differentiable, of an implementation that brings two functions.

    products(settings, xs, ws, group_sizes_E, *, transpose_w, finish, results): for the rows of every expert e, finish
        of the float32 products x w0[e], x w1[e], ... if xs holds one array, or of the sum of x0 w0[e], x1 w1[e], ... if
        it holds one for each of ws; `results` arrays [M, F] in x's dtype, with zeros for rows of no expert.
    weight_gradient(settings, left_MA, right_MC, group_sizes_E, dtype): left^T right within each expert's rows,
        [E, A, C].

    matmul(settings, transpose_w, x_MD, w, group_sizes_E) and swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E)
    return [M, F] in x's dtype. `settings` are whatever the implementation wants, static.
    """

    def of_weight(settings, left, right, group_sizes_E, w):
        return None if isinstance(w, Scaled) else weight_gradient(settings, left, right, group_sizes_E, w.dtype)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def matmul(settings, transpose_w, x_MD, w, group_sizes_E):
        return products(settings, (x_MD,), (w,), group_sizes_E, transpose_w=transpose_w, finish=_alone, results=1)[0]

    def matmul_forward(settings, transpose_w, x_MD, w, group_sizes_E):
        return matmul(settings, transpose_w, x_MD, w, group_sizes_E), (x_MD, w, group_sizes_E)

    def matmul_backward(settings, transpose_w, residuals, dy_MF):
        x_MD, w, group_sizes_E = residuals
        dx_MD = matmul(settings, not transpose_w, *_towards_input(dy_MF, w, group_sizes_E), group_sizes_E)
        left, right = (dy_MF, x_MD) if transpose_w else (x_MD, dy_MF)
        return dx_MD, of_weight(settings, left, right, group_sizes_E, w), None

    matmul.defvjp(matmul_forward, matmul_backward)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E):
        ws = (gate_EFD, up_EFD)
        return products(settings, (x_MD,), ws, group_sizes_E, transpose_w=True, finish=_silu_times, results=1)[0]

    def swiglu_forward(settings, x_MD, gate_EFD, up_EFD, group_sizes_E):
        ws = (gate_EFD, up_EFD)
        h_MF, g_MF, u_MF = products(
            settings, (x_MD,), ws, group_sizes_E, transpose_w=True, finish=_silu_times_and_both, results=3
        )
        return h_MF, (x_MD, gate_EFD, up_EFD, group_sizes_E, g_MF, u_MF)

    def swiglu_backward(settings, residuals, dh_MF):
        x_MD, gate_EFD, up_EFD, group_sizes_E, g_MF, u_MF = residuals
        g, u, dh = (x.astype(jnp.float32) for x in (g_MF, u_MF, dh_MF))
        dg_MF, du_MF = (x.astype(x_MD.dtype) for x in jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)[1](dh))
        both = [_towards_input(dy_MF, w, group_sizes_E) for dy_MF, w in ((dg_MF, gate_EFD), (du_MF, up_EFD))]
        xs, ws = zip(*both, strict=True)
        (dx_MD,) = products(settings, xs, ws, group_sizes_E, transpose_w=False, finish=_alone, results=1)
        dgate_EFD = of_weight(settings, dg_MF, x_MD, group_sizes_E, gate_EFD)
        return dx_MD, dgate_EFD, of_weight(settings, du_MF, x_MD, group_sizes_E, up_EFD), None

    swiglu.defvjp(swiglu_forward, swiglu_backward)
    return matmul, swiglu


def _alone(y):
    return (y,)


def _silu_times(g, u):
    return (jax.nn.silu(g) * u,)


def _silu_times_and_both(g, u):
    return jax.nn.silu(g) * u, g, u
