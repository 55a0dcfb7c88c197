# SPDX-License-Identifier: Apache-2.0
"""Sorts the rows of a mixture of experts by expert, and back.

Every token goes to k experts, so there are M = T * k rows. Both directions, and both gradients, are gathers: each row
has exactly one source, so nothing is scattered or added in an undefined order.

T tokens, k experts per token, M rows sorted by expert, E experts, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Order(NamedTuple):
    """A permutation of the (token, choice) pairs that brings the rows of each expert together."""

    pairs_M: jax.Array  # row m holds choice pairs_M[m] % k of token pairs_M[m] // k
    rows_Tk: jax.Array  # the inverse: choice j of token t is row rows_Tk[t, j]
    group_sizes_E: jax.Array  # rows of each expert, in this order


def sort_by_expert(experts_Tk, num_experts) -> Order:
    """The order of experts_Tk (int [T, k], the chosen experts), stable: rows of an expert keep the order of the tokens.

    A choice outside 0 .. num_experts - 1 belongs to no expert: its row comes after all groups, where grouped_matmul
    gives zeros. So padding tokens, or another device's experts, cost nothing.
    """
    experts_M = experts_Tk.reshape(-1)
    experts_M = jnp.where((experts_M >= 0) & (experts_M < num_experts), experts_M, num_experts)
    pairs_M = jnp.argsort(experts_M, stable=True)
    rows_Tk = jnp.argsort(pairs_M).reshape(experts_Tk.shape)
    group_sizes_E = jnp.sum(experts_M[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Order(pairs_M, rows_Tk, group_sizes_E)


@jax.custom_vjp
def permute(x_TD, order: Order):
    """Rows of the tokens sorted by expert, [M, D]: each token appears once per choice."""
    return x_TD[order.pairs_M // order.rows_Tk.shape[1]]


def _permute_forward(x_TD, order):
    return permute(x_TD, order), order


def _permute_backward(order, dy_MD):
    dx_TD = jnp.sum(dy_MD[order.rows_Tk], axis=1, dtype=jnp.float32)
    return dx_TD.astype(dy_MD.dtype), _no_gradient(order)


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(y_MD, weights_Tk, order: Order):
    """Weighted sum of each token's rows, [T, D] in y's dtype; the sum is made in float32."""
    out_TD = jnp.einsum("tk,tkd->td", weights_Tk, y_MD[order.rows_Tk], preferred_element_type=jnp.float32)
    return out_TD.astype(y_MD.dtype)


def _unpermute_forward(y_MD, weights_Tk, order):
    return unpermute(y_MD, weights_Tk, order), (y_MD, weights_Tk, order)


def _unpermute_backward(residuals, dout_TD):
    y_MD, weights_Tk, order = residuals
    weights_M = weights_Tk.reshape(-1)[order.pairs_M]
    dy_MD = weights_M[:, None] * dout_TD[order.pairs_M // weights_Tk.shape[1]]
    dweights_Tk = jnp.einsum("td,tkd->tk", dout_TD, y_MD[order.rows_Tk], preferred_element_type=jnp.float32)
    return dy_MD.astype(y_MD.dtype), dweights_Tk.astype(weights_Tk.dtype), _no_gradient(order)


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _no_gradient(order):
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), order)
