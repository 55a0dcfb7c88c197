# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products in plain XLA: most rows in one batched product, the rest expert by expert.

lax.ragged_dot multiplies every row by every expert on CPU and GPU. Here every expert gets an equal share, a little more
than the mean, and the first `share` rows of each are laid out side by side for one batched product: where a router
balances its experts that is nearly everything. What an expert has beyond its share follows in a loop over the experts
and over tiles of their rows, whose trip counts come from the group sizes. Where most experts have few rows or none (a
token or two being decoded) the loop does it all, and only the experts that were chosen are read. The shares are little
more than M rows together, so the work stays within a small multiple of M, whatever the group sizes are.

M rows sorted by expert, E experts, D width in, F width out.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from .gradients import Scaled, with_gradients

TILE = 256  # rows of one product of the loop, at most
LEFTOVER = 64  # the same for the rows that remain after a batched product
PANEL = 2**17  # numbers of an expert's matrix taken at a time where a product has few rows
LAID_OUT = 2**27  # numbers in the arrays around a batched product, at most: half a GiB in float32


@functools.partial(jax.jit, static_argnames=("transpose_w", "tile"))
def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, tile=None):
    """Returns [M, F] in x's dtype; w may be Scaled. With `tile` there is only the loop, of products of so many rows."""
    return _matmul(tile, transpose_w, x_MD, w, group_sizes_E)


@functools.partial(jax.jit, static_argnames=("tile",))
def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, *, tile=None):
    """Returns [M, F] in x's dtype; both products of a row are made together."""
    return _swiglu(tile, x_MD, gate_EFD, up_EFD, group_sizes_E)


def tile_rows(M, E):
    """Rows per tile: about the mean group, a power of two, so that short groups are not mostly filling.

    Never one: XLA's product with a single bfloat16 row is ten times slower than with two on CPU.
    """
    return 2 ** math.floor(math.log2(min(max(M / E, 2), TILE)))


def share(M, E, numbers_per_row):
    """Rows that each expert has in the batched product, a multiple of 8; 0 for no batched product.

    The mean and one and a half standard deviations of a router that chooses blindly: 14 of 15 experts have no more.
    `numbers_per_row` are those of all arrays laid out for the product.
    """
    mean = M / E
    rows = 8 * max(1, round((mean + 1.5 * mean**0.5) / 8))
    return rows if 2 * M >= E and E * rows * numbers_per_row <= LAID_OUT else 0


def balanced(group_sizes_E, rows):
    """Whether the batched product is worth it: half of the experts have at least a quarter of a share."""
    return 2 * jnp.sum(4 * group_sizes_E >= rows) >= len(group_sizes_E)


def long_enough(x_MD, rows):
    """x with zeros behind it where it is shorter than `rows`."""
    return jnp.pad(x_MD, ((0, max(0, rows - len(x_MD))), (0, 0)))


def lay_out(x_MD, begin_E, rows):
    """`rows` rows of x from begin_E on, [E, rows, D]."""
    return jax.vmap(lambda begin: lax.dynamic_slice_in_dim(x_MD, begin, rows))(begin_E)


def to_visit(left_E):
    """(order [E], count): the experts with rows left to do are order[:count], in ascending order."""
    some_E = left_E > 0
    return jnp.argsort(~some_E, stable=True), jnp.sum(some_E)


def tiles_of(left_E, tile):
    """How many tiles each expert takes, [E]; they start at the first row to do, not at multiples of `tile`."""
    return (left_E + tile - 1) // tile


def _products(tile, xs, ws, group_sizes_E, *, transpose_w, finish, results):
    """As with_gradients wants it: `results` arrays [M, F] in x's dtype, zero in the rows that belong to no expert."""
    (M, D), dtype = xs[0].shape, xs[0].dtype
    E, F = len(group_sizes_E), ws[0].shape[1 if transpose_w else 2]
    # Integers are widened an expert's matrix or panel at a time; factors of outputs are applied to the products.
    scales = [w.scale if isinstance(w, Scaled) and w.by_output else None for w in ws]
    ws = [w.values if isinstance(w, Scaled) and w.by_output else w for w in ws]
    narrow = isinstance(ws[0], Scaled) or ws[0].dtype.itemsize < dtype.itemsize

    def wide(w):
        return w.dequantised(dtype) if isinstance(w, Scaled) else w.astype(dtype) if narrow else w

    first_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    rows = 0 if tile else share(M, E, len(ws) * (D + F) + results * F)
    tile = tile or min(tile_rows(M, E), LEFTOVER if rows else TILE)
    xs = [long_enough(x, max(rows, tile)) for x in xs]
    L = len(xs[0])

    def made_of(xs, ws, dims, scales):
        products = [_dot(xs[p % len(xs)], w, dims) for p, w in enumerate(ws)]
        products = [y if scale is None else y * scale for y, scale in zip(products, scales, strict=True)]
        return finish(*products) if len(xs) == 1 else finish(sum(products))

    def batched():
        dims = (((2,), (2 if transpose_w else 1,)), ((0,), (0,)))
        begin_E = jnp.minimum(first_E, L - rows)  # at the end a share reaches back, and its expert's rows are its last
        laid_out = [lay_out(x, begin_E, rows) for x in xs]
        if narrow:
            one = (((1,), (1 if transpose_w else 0,)), ((), ()))

            def of_expert(expert):
                xs, ws, scales = expert
                return made_of(xs, [wide(w) for w in ws], one, scales)

            made = lax.map(of_expert, (laid_out, ws, scales))
        else:
            made = made_of(laid_out, ws, dims, scales)
        row_L = jnp.arange(L)
        expert_L = jnp.minimum(jnp.sum(row_L[:, None] >= jnp.cumsum(group_sizes_E), axis=1), E - 1)
        mine_L1 = (row_L - first_E[expert_L] < jnp.minimum(group_sizes_E[expert_L], rows))[:, None]
        place_L = expert_L * rows + jnp.minimum(row_L - begin_E[expert_L], rows - 1)
        return tuple(jnp.where(mine_L1, y.astype(dtype).reshape(E * rows, F)[place_L], 0) for y in made)

    done_E, outs = jnp.zeros_like(group_sizes_E), (jnp.zeros((L, F), dtype),) * results
    if rows:
        some = balanced(group_sizes_E, rows)
        outs = lax.cond(some, batched, lambda: outs)
        done_E = jnp.where(some, jnp.minimum(group_sizes_E, rows), 0)

    # The rest. XLA copies an expert's matrix out of the stack before the product. With many rows that does not matter;
    # with few it would cost as much as the product, so the copy is made in panels that stay in cache until it is read.
    panel = F if tile > 8 else min(F, max(64, PANEL // D))
    if isinstance(ws[0], Scaled) and not transpose_w:
        panel = F  # a panel of columns would cut groups
    dims = (((1,), (1 if transpose_w else 0,)), ((), ()))
    left_E = group_sizes_E - done_E
    (order_E, count), tiles_E = to_visit(left_E), tiles_of(left_E, tile)

    def visit_panel(e, column, outs):
        def of_panel(part):
            start = (e, column, 0) if transpose_w else (e, 0, column)
            size = (1, panel, part.shape[2]) if transpose_w else (1, part.shape[1], min(panel, part.shape[2]))
            return lax.dynamic_slice(part, start, size)[0]

        matrices = [wide(w) for w in jax.tree.map(of_panel, ws)]
        factors = [None if scale is None else lax.dynamic_slice(scale, (e, column), (1, panel)) for scale in scales]

        def visit_tile(t, outs):
            first = first_E[e] + done_E[e] + t * tile
            row = jnp.minimum(first, L - tile)  # the last tile of all reaches back
            tiles = [lax.dynamic_slice_in_dim(x, row, tile) for x in xs]
            made = made_of(tiles, matrices, dims, factors)
            # Rows of other groups, on which a group's last tile runs, keep what they have.
            row_X = row + jnp.arange(tile)
            mine_X1 = ((row_X >= first) & (row_X < first_E[e] + group_sizes_E[e]))[:, None]
            there = [lax.dynamic_slice(out, (row, column), (tile, panel)) for out in outs]
            return tuple(
                lax.dynamic_update_slice(out, jnp.where(mine_X1, y.astype(dtype), old), (row, column))
                for out, y, old in zip(outs, made, there, strict=True)
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

    outs = lax.fori_loop(0, count, visit_expert, outs)
    return tuple(out[:M] for out in outs)


def _weight_gradient(tile, left_MA, right_MC, group_sizes_E, dtype):
    """left^T right within each expert's rows: [E, A, C] in `dtype`, zeros for an expert without rows."""
    M, E, A, C = len(left_MA), len(group_sizes_E), left_MA.shape[1], right_MC.shape[1]
    first_E, end_E = jnp.cumsum(group_sizes_E) - group_sizes_E, jnp.cumsum(group_sizes_E)
    rows = 0 if tile else share(M, E, A + C)
    rows = rows if E * A * C <= LAID_OUT else 0  # XLA writes all sums in float32 before it rounds them
    tile = min(max(2 * (tile or tile_rows(M, E)), 16), TILE)  # a tile costs a pass over the sums: larger is better here
    factors = [long_enough(x, max(rows, tile)) for x in (left_MA, right_MC)]
    L = len(factors[0])

    def batched():
        begin_E = jnp.minimum(first_E, L - rows)
        row_EX = begin_E[:, None] + jnp.arange(rows)
        mine_EX1 = ((row_EX >= first_E[:, None]) & (row_EX < end_E[:, None]))[..., None]
        left, right = (jnp.where(mine_EX1, lay_out(x, begin_E, rows), 0) for x in factors)
        return _dot(left, right, (((1,), (1,)), ((0,), (0,)))).astype(dtype)

    left_E, out_EAC = group_sizes_E, jnp.zeros((E, A, C), dtype)
    if rows:  # an expert with more than its share is done by the loop from the beginning, to be rounded only once
        some = balanced(group_sizes_E, rows)
        out_EAC = lax.cond(some, batched, lambda: out_EAC)
        left_E = jnp.where(some & (group_sizes_E <= rows), 0, group_sizes_E)
    (order_E, count), tiles_E = to_visit(left_E), tiles_of(left_E, tile)

    def visit_expert(i, out_EAC):
        e = order_E[i]

        def visit_tile(t, sum_AC):
            first = first_E[e] + t * tile
            row = jnp.minimum(first, L - tile)
            row_X = row + jnp.arange(tile)
            mine_X1 = ((row_X >= first) & (row_X < end_E[e]))[:, None]
            tiles = [jnp.where(mine_X1, lax.dynamic_slice_in_dim(x, row, tile), 0) for x in factors]
            return sum_AC + _dot(*tiles, (((0,), (0,)), ((), ())))

        sum_AC = lax.fori_loop(0, tiles_E[e], visit_tile, jnp.zeros((A, C), jnp.float32))
        return lax.dynamic_update_slice_in_dim(out_EAC, sum_AC[None].astype(dtype), e, 0)

    return lax.fori_loop(0, count, visit_expert, out_EAC)


def _dot(x, y, dims):
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


_matmul, _swiglu = with_gradients(_products, _weight_gradient)
