# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights in plain XLA: on each platform the form that does not write the weight to memory.

Two forms are equal up to rounding. "Dequantised": the weight is made in x's dtype and multiplied. "By group": a product
of integers for each group, and the partial sums times the scales; it writes G partial sums for each row where XLA does
not fuse them. What XLA's compilers did with [18944, 3584] in int4 (tests/kernels/test_weight_only_matmul_compiles.py):
on TPUs one row fuses dequantised and more rows fuse by group, but v5p copies the packed integers first; for GPUs the
dequantised weight is always written, and by group the partial sums are, which are smaller for up to about ten rows. On
a CPU the weight is dequantised in blocks of outputs, which was fastest at every number of rows.

M rows, I inputs, O outputs, G groups, g inputs of a group.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax

from .gradients import with_gradient
from .reference import dequantised

GPU_ROWS = 8  # rows up to which a GPU multiplies by group
BLOCK = 2**24  # numbers that a CPU dequantises at a time, at most: 64 MiB of float32


def weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG, *, dtype):
    """Returns [M, O] in `dtype`."""
    return _product(jnp.dtype(dtype), x_MI, values_OI, scale_OG, offset_OG)


def _chosen(dtype, x_MI, values_OI, scale_OG, offset_OG):
    rows = math.prod(x_MI.shape[:-1])
    on_gpu = _by_group if rows <= GPU_ROWS else _dequantised
    on_tpu = _dequantised if rows == 1 else _by_group
    return lax.platform_dependent(
        x_MI, values_OI, scale_OG, offset_OG,
        cpu=_in_blocks, cuda=on_gpu, rocm=on_gpu, default=on_tpu,
    ).astype(dtype)  # fmt: skip


def _dequantised(x_MI, values_OI, scale_OG, offset_OG):
    return _dot(x_MI, dequantised(values_OI, scale_OG, offset_OG).astype(x_MI.dtype))


def _by_group(x_MI, values_OI, scale_OG, offset_OG):
    O, G = scale_OG.shape
    x_MGg = x_MI.reshape(*x_MI.shape[:-1], G, -1)
    w_OGg = values_OI.reshape(O, G, -1).astype(x_MI.dtype)
    rows = x_MI.ndim - 1
    over_g = (((rows + 1,), (2,)), ((rows,), (1,)))
    sums_GMO = lax.dot_general(x_MGg, w_OGg, over_g, preferred_element_type=jnp.float32)
    y_MO = jnp.sum(sums_GMO * scale_OG.T.reshape(G, *[1] * rows, O), axis=0)
    if offset_OG is None:
        return y_MO
    return y_MO - _dot(jnp.sum(x_MGg.astype(jnp.float32), axis=-1), offset_OG, precision=lax.Precision.HIGHEST)


def _in_blocks(x_MI, values_OI, scale_OG, offset_OG):
    x_MI = x_MI.astype(jnp.float32)
    O, I = values_OI.shape
    block = min(O, max(1, BLOCK // I))

    def of(first):
        of_block = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=block)
        offset = None if offset_OG is None else of_block(offset_OG)
        return _dequantised(x_MI, of_block(values_OI), of_block(scale_OG), offset)

    if block == O:
        return _dequantised(x_MI, values_OI, scale_OG, offset_OG)

    def add(n, y_MO):  # the last block reaches back into the one before; computing an output twice does no harm
        first = jnp.minimum(n * block, O - block)
        return lax.dynamic_update_slice_in_dim(y_MO, of(first), first, axis=-1)

    return lax.fori_loop(0, -(-O // block), add, jnp.zeros((*x_MI.shape[:-1], O), jnp.float32))


def _dot(x_MI, w_OI, precision=None):
    over_I = (((x_MI.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x_MI, w_OI, over_I, precision=precision, preferred_element_type=jnp.float32)


_product = with_gradient(_chosen)
