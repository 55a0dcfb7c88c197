# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products from the definition, in float32: every row times every expert, then the row's own is kept."""

import jax
import jax.numpy as jnp

from .gradients import Scaled


def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False):
    """Returns [M, F] in x's dtype."""
    if isinstance(w, Scaled):
        w = w.dequantised(jnp.float32)
    equation = "md,efd->emf" if transpose_w else "md,edf->emf"
    every_EMF = jnp.einsum(equation, x_MD.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    end_E = jnp.cumsum(group_sizes_E)
    row_M = jnp.arange(x_MD.shape[0])
    mine_EM = (row_M >= (end_E - group_sizes_E)[:, None]) & (row_M < end_E[:, None])
    return jnp.sum(jnp.where(mine_EM[..., None], every_EMF, 0), axis=0).astype(x_MD.dtype)


def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E):
    """Returns [M, F] in x's dtype."""
    gate_MF = grouped_matmul(x_MD.astype(jnp.float32), gate_EFD, group_sizes_E, transpose_w=True)
    up_MF = grouped_matmul(x_MD.astype(jnp.float32), up_EFD, group_sizes_E, transpose_w=True)
    return (jax.nn.silu(gate_MF) * up_MF).astype(x_MD.dtype)
