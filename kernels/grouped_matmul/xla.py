# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products in plain XLA: a loop over the experts that have rows, and over tiles of their rows.

lax.ragged_dot multiplies every row by every expert on CPU and GPU. Here the trip counts are computed from the group
sizes, so only the experts that were chosen are read and only about the rows that exist are multiplied.

M rows sorted by expert, E experts, D width in, F width out.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

TILE = 256  # rows of one product, at most
PANEL = 2**17  # numbers of an expert's matrix taken at a time where a product has few rows


@functools.partial(jax.jit, static_argnames=("transpose_w", "tile"))
def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, tile=None):
    """Returns [M, F] in x's dtype. `tile`, the rows of one product, is chosen from M and E if not given."""
    return _matmul(transpose_w, tile or tile_rows(x_MD.shape[0], w.shape[0]), x_MD, w, group_sizes_E)


@functools.partial(jax.jit, static_argnames=("tile",))
def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, *, tile=None):
    """Returns [M, F] in x's dtype; both products of a tile are made together."""
    return _swiglu(tile or tile_rows(x_MD.shape[0], gate_EFD.shape[0]), x_MD, gate_EFD, up_EFD, group_sizes_E)


def tile_rows(M, E):
    """Rows per tile: about the mean group, a power of two, so that short groups are not mostly filling.

    Never one: XLA's product with a single bfloat16 row is ten times slower than with two on CPU.
    """
    return 2 ** math.floor(math.log2(min(max(M / E, 2), TILE)))


def active_experts(group_sizes_E):
    """(order [E], count): the experts that have rows are order[:count], in ascending order."""
    some_E = group_sizes_E > 0
    return jnp.argsort(~some_E, stable=True), jnp.sum(some_E)


def tiles_of(group_sizes_E, tile):
    """How many tiles each expert takes, [E]; a tile starts at the expert's first row, not at a multiple of `tile`."""
    return (group_sizes_E + tile - 1) // tile


def _products(pairs, group_sizes_E, *, transpose_w, tile, finish, results):
    """For every tile of every expert e: finish([x_tile @ w[e] for x, w in pairs]), a tuple of `results` float32 arrays.

    pairs holds (x [M, D], w [E, D, F], or [E, F, D] with transpose_w). Returns arrays [M, F] in x's dtype, zero in the
    rows that belong to no expert.
    """
    (M, D), dtype = pairs[0][0].shape, pairs[0][0].dtype
    out_dim = 1 if transpose_w else 2
    F = pairs[0][1].shape[out_dim]
    # XLA copies an expert's matrix out of the stack before the product. With many rows that does not matter; with few
    # it would cost as much as the product, so the copy is made in panels that are still in cache when they are read.
    panel = F if tile > 8 else min(F, max(64, PANEL // D))
    dims = (((1,), (1 if transpose_w else 0,)), ((), ()))
    order_E, count = active_experts(group_sizes_E)
    first_E, tiles_E = jnp.cumsum(group_sizes_E) - group_sizes_E, tiles_of(group_sizes_E, tile)
    # The last tile of a group runs on into rows of the next group, whose own tiles come later and overwrite them.
    padded = [jnp.pad(x, ((0, tile), (0, 0))) for x, _ in pairs]

    def visit_panel(e, column, outs):
        matrices = []
        for _, w in pairs:
            start = (e, column, 0) if transpose_w else (e, 0, column)
            size = (1, panel, w.shape[2]) if transpose_w else (1, w.shape[1], panel)
            matrices.append(lax.dynamic_slice(w, start, size)[0])

        def visit_tile(t, outs):
            row = first_E[e] + t * tile
            tiles = [lax.dynamic_slice_in_dim(x, row, tile) for x in padded]
            made = finish(*(_dot(x, w, dims) for x, w in zip(tiles, matrices, strict=True)))
            return tuple(
                lax.dynamic_update_slice(out, y.astype(dtype), (row, column)) for out, y in zip(outs, made, strict=True)
            )

        return lax.fori_loop(0, tiles_E[e], visit_tile, outs)

    def visit_expert(i, outs):
        e = order_E[i]
        if panel == F:
            return visit_panel(e, 0, outs)
        # The last panel reaches back into the one before; computing a column twice does no harm.
        return lax.fori_loop(
            0, -(-F // panel), lambda p, outs: visit_panel(e, jnp.minimum(p * panel, F - panel), outs), outs
        )

    outs = lax.fori_loop(0, count, visit_expert, (jnp.zeros((M + tile, F), dtype),) * results)
    owned_M1 = (jnp.arange(M) < jnp.sum(group_sizes_E))[:, None]
    return tuple(jnp.where(owned_M1, out[:M], 0) for out in outs)


def _weight_gradient(left_MA, right_MC, group_sizes_E, dtype, tile):
    """left^T right within each expert's rows: [E, A, C] in `dtype`, zeros for an expert without rows."""
    tile = min(max(2 * tile, 16), TILE)  # a tile costs a pass over the [A, C] sums: larger is better here
    E, A, C = len(group_sizes_E), left_MA.shape[1], right_MC.shape[1]
    order_E, count = active_experts(group_sizes_E)
    first_E, tiles_E = jnp.cumsum(group_sizes_E) - group_sizes_E, tiles_of(group_sizes_E, tile)
    left, right = (jnp.pad(x, ((0, tile), (0, 0))) for x in (left_MA, right_MC))

    def visit_expert(i, out_EAC):
        e = order_E[i]

        def visit_tile(t, sum_AC):
            row, rest = first_E[e] + t * tile, group_sizes_E[e] - t * tile
            mine = (jnp.arange(tile) < rest)[:, None]
            left_tile = jnp.where(mine, lax.dynamic_slice_in_dim(left, row, tile), 0)
            return sum_AC + _dot(left_tile, lax.dynamic_slice_in_dim(right, row, tile), (((0,), (0,)), ((), ())))

        sum_AC = lax.fori_loop(0, tiles_E[e], visit_tile, jnp.zeros((A, C), jnp.float32))
        return lax.dynamic_update_slice_in_dim(out_EAC, sum_AC[None].astype(dtype), e, 0)

    return lax.fori_loop(0, count, visit_expert, jnp.zeros((E, A, C), dtype))


def _dot(x, y, dims):
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------- gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(transpose_w, tile, x_MD, w, group_sizes_E):
    pairs = ((x_MD, w),)
    return _products(pairs, group_sizes_E, transpose_w=transpose_w, tile=tile, finish=lambda y: (y,), results=1)[0]


def _matmul_forward(transpose_w, tile, x_MD, w, group_sizes_E):
    return _matmul(transpose_w, tile, x_MD, w, group_sizes_E), (x_MD, w, group_sizes_E)


def _matmul_backward(transpose_w, tile, residuals, dy_MF):
    x_MD, w, group_sizes_E = residuals
    dx_MD = _matmul(not transpose_w, tile, dy_MF, w, group_sizes_E)
    left, right = (dy_MF, x_MD) if transpose_w else (x_MD, dy_MF)
    return dx_MD, _weight_gradient(left, right, group_sizes_E, w.dtype, tile), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(tile, x_MD, gate_EFD, up_EFD, group_sizes_E):
    pairs = ((x_MD, gate_EFD), (x_MD, up_EFD))
    return _products(
        pairs, group_sizes_E, transpose_w=True, tile=tile, finish=lambda g, u: (jax.nn.silu(g) * u,), results=1
    )[0]


def _swiglu_forward(tile, x_MD, gate_EFD, up_EFD, group_sizes_E):
    pairs = ((x_MD, gate_EFD), (x_MD, up_EFD))
    h_MF, g_MF, u_MF = _products(
        pairs, group_sizes_E, transpose_w=True, tile=tile, finish=lambda g, u: (jax.nn.silu(g) * u, g, u), results=3
    )
    return h_MF, (x_MD, gate_EFD, up_EFD, group_sizes_E, g_MF, u_MF)


def _swiglu_backward(tile, residuals, dh_MF):
    x_MD, gate_EFD, up_EFD, group_sizes_E, g_MF, u_MF = residuals
    g, u, dh = (x.astype(jnp.float32) for x in (g_MF, u_MF, dh_MF))
    dg_MF, du_MF = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)[1](dh)
    dg_MF, du_MF = dg_MF.astype(x_MD.dtype), du_MF.astype(x_MD.dtype)
    (dx_MD,) = _products(
        ((dg_MF, gate_EFD), (du_MF, up_EFD)),
        group_sizes_E,
        transpose_w=False,
        tile=tile,
        finish=lambda by_gate, by_up: (by_gate + by_up,),
        results=1,
    )
    dgate_EFD = _weight_gradient(dg_MF, x_MD, group_sizes_E, gate_EFD.dtype, tile)
    return dx_MD, dgate_EFD, _weight_gradient(du_MF, x_MD, group_sizes_E, up_EFD.dtype, tile), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
