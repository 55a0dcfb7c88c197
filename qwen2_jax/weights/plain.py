# SPDX-License-Identifier: Apache-2.0
"""Weights stored as one array: products, and rows of an embedding."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen2_jax.ops import embedding
from qwen2_jax.parallel import sharding

MANY_ROWS = 256  # from here on XLA:CPU is faster with a product's inputs converted to float32


def matmul(x: jax.Array, w: jax.Array, contract: int, dtype) -> jax.Array:
    """x [..., *in] times w [*out, *in], summed over the last `contract` dimensions of both: [..., *out] in `dtype`."""
    multiply = product if x.dtype.itemsize >= 4 else _half_product

    def run(x_MI):
        return multiply(x_MI, w.reshape(-1, x_MI.shape[-1]), dtype)

    return over_rows(run, x, contract, w.shape[: w.ndim - contract])


def over_rows(
    run: Callable[[jax.Array], jax.Array], x: jax.Array, contract: int, outputs: tuple[int, ...]
) -> jax.Array:
    """run(x_MI), [M, O], of x [..., *in] with its last `contract` dimensions made one (I): [..., *outputs].

    The other dimensions of x become the rows M. On a mesh they stay apart: batch and tokens may both be split, and one
    dimension of both together could not be, so XLA would gather it.
    """
    rows = x.shape[: x.ndim - contract]
    x_MI = x.reshape(*(rows if sharding.current_mesh() else (math.prod(rows),)), -1)
    return run(x_MI).reshape(*rows, *outputs)


def product(x_MI: jax.Array, w_OI: jax.Array, dtype) -> jax.Array:
    """x w^T, accumulated in `dtype` at least. x may have several dimensions of rows."""
    return lax.dot_general(x_MI, w_OI, (((x_MI.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _half_product(x_MI: jax.Array, w_OI: jax.Array, dtype) -> jax.Array:
    """The product of bfloat16 with the two detours that XLA:CPU needs; elsewhere it is `product`."""

    def on_cpu(x_MI, w_OI):
        M = math.prod(x_MI.shape[:-1])
        if M == 1:  # XLA converts the whole weight for a single row, which takes 10 times as long as two rows
            return product(jnp.concatenate([x_MI, jnp.zeros_like(x_MI)]), w_OI, dtype)[:1]
        if M >= MANY_ROWS:
            return product(x_MI.astype(jnp.float32), w_OI.astype(jnp.float32), jnp.float32).astype(dtype)
        return product(x_MI, w_OI, dtype)

    return lax.platform_dependent(x_MI, w_OI, cpu=on_cpu, default=lambda x, w: product(x, w, dtype))


def take(table_VD: jax.Array, ids: jax.Array, dtype) -> jax.Array:
    """table_VD[ids] in the table's own dtype, with a gradient that is summed in float32."""
    return _rows(table_VD.shape, table_VD, ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(shape: tuple[int, int], table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return embedding.look_up(lambda table_VD, ids: table_VD[ids], table_VD, ids)


def _rows_forward(shape: tuple[int, int], table_VD: jax.Array, ids: jax.Array):
    return _rows(shape, table_VD, ids), (ids, table_VD[:0])


def _rows_backward(shape: tuple[int, int], residuals, gradient: jax.Array):
    """A frequent token's row is the sum of thousands of terms: in bfloat16 it would stop growing at a few hundred."""
    ids, like = residuals
    sums_VD = embedding.add_up(shape, ids, gradient)
    return sums_VD.astype(like.dtype), np.zeros(ids.shape, jax.dtypes.float0)


_rows.defvjp(_rows_forward, _rows_backward)


def along(w: jax.Array, axis: int, change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The array with `change` applied along one dimension, which `change` gets as an array's first."""
    return jnp.moveaxis(change(jnp.moveaxis(w, axis, 0)), 0, axis)
