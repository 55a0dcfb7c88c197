# SPDX-License-Identifier: Apache-2.0
"""Grouped products with matrices of small integers (Scaled), on top of a device's kernels.

Few rows of each expert (decoding, short prompts): the rows are copied into blocks that hold rows of one expert each,
and the kernel of weight_only_matmul multiplies each block by its own expert's matrix. It reads the integers of the
experts that have rows, as they are stored, and nothing of the others.

Many rows: that kernel would convert the integers again for each block, and every expert has rows anyway. So a few
experts at a time are dequantised to x's dtype, and the kernel for such matrices multiplies their rows. By count, to
write and read the matrices takes as long as the products of about 500 rows of each expert, 4,096 tokens of the
57B-A14B. The gradient of x, which training wants of many rows, is made in the same way.

M rows sorted by expert, E experts, D width in, F width out, Z blocks of X rows, n experts dequantised at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..counts import Count
from .gradients import Scaled, with_gradients

FEW = 128  # rows of each expert, on average, up to which integers are multiplied as they are
WIDENED = 2**30  # bytes of the matrices that are dequantised at a time, at most


class Settings(NamedTuple):
    """What the products are compiled for; static."""

    blocks: Callable  # multiply_blocks of weight_only_matmul's kernels
    cut: Any  # its first argument, with the rows of a block; None for many rows
    interpret: Any
    dequantise: Callable  # (interpret, dtype, n, first, values, scale, offset): n matrices in `dtype`
    wide: Callable  # _products of the kernels for matrices in x's dtype
    settings: Any  # its first argument


def block_rows(M: int, E: int, unit: int, most: int) -> int | None:
    """Rows of a block, a multiple of `unit` and no more than `most`; None for many rows of each expert.

    The mean and two standard deviations of a router that chooses blindly: nearly all experts need one block.
    """
    if FEW * E < M:
        return None
    mean = M / E
    return min(most, unit * max(1, math.ceil((mean + 2 * mean**0.5) / unit)))


def with_groups(w: Scaled):
    """(values, scale, offset), the scale [E, F, G]."""
    return w.values, w.scale[..., None] if w.by_output else w.scale, w.offset


def dequantise(_, dtype, n, first, *parts):
    """In plain XLA, for GPUs, where it is one fusion. For TPUs XLA would write the scales of all inputs to memory."""
    return Scaled(*jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, first, n), parts)).dequantised(dtype)


def groups_of(ws) -> int:
    """G of all matrices. Raises NotImplementedError where they are not stored alike."""
    forms = {isinstance(w, Scaled) and (w.values.dtype, w.scale.shape, w.offset is None) for w in ws}
    if len(forms) > 1:
        raise NotImplementedError("needs gate and up of one form: integers, groups and offsets alike")
    return 1 if ws[0].by_output else ws[0].scale.shape[-1]


class Blocks(NamedTuple):
    """Blocks z < number hold the rows of one expert each, from its first row on; experts ascend."""

    expert_Z: jax.Array  # int32
    row_ZX: jax.Array  # int32: which row each row of a block is; beyond the expert's last any
    number: jax.Array  # int32 [1]
    place_M: jax.Array  # int32: where row m is, z * X + x; of rows of no expert any
    owned_M: jax.Array  # bool: rows of some expert


def capacity(M: int, E: int, X: int) -> int:
    """The most blocks that any group sizes can make."""
    return min(M, (M + min(M, E) * (X - 1)) // X)


@functools.partial(jax.jit, static_argnums=(1, 2))
def lay_out(group_sizes_E, M: int, X: int) -> Blocks:
    """The blocks for M > 0 rows. Groups that run over M are cut there."""
    E = len(group_sizes_E)
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), M)
    begin_E = jnp.append(jnp.int32(0), end_E[:-1])
    stop_E = jnp.cumsum((end_E - begin_E + X - 1) // X, dtype=jnp.int32)
    start_E = jnp.append(jnp.int32(0), stop_E[:-1])

    z = jnp.arange(capacity(M, E, X), dtype=jnp.int32)
    expert_Z = jnp.minimum(jnp.sum(stop_E <= z[:, None], axis=1, dtype=jnp.int32), E - 1)
    first_Z = begin_E[expert_Z] + (z - start_E[expert_Z]) * X
    row_ZX = jnp.minimum(first_Z[:, None] + jnp.arange(X, dtype=jnp.int32), M - 1)

    m = jnp.arange(M, dtype=jnp.int32)
    expert_M = jnp.minimum(jnp.sum(end_E <= m[:, None], axis=1, dtype=jnp.int32), E - 1)
    place_M = start_E[expert_M] * X + m - begin_E[expert_M]  # blocks of an expert follow each other
    return Blocks(expert_Z, row_ZX, stop_E[-1:], place_M, m < end_E[-1])


def _products(settings, xs, ws, group_sizes_E, *, transpose_w, finish, results):
    """As with_gradients wants it: `results` arrays [M, F] in x's dtype. The factors of outputs of integers [E, D, F],
    which the gradient of x has, are in xs already.
    """
    if settings.cut is None or not transpose_w:
        return _dequantised(settings, xs, ws, group_sizes_E, transpose_w=transpose_w, finish=finish, results=results)
    (x_MD,) = xs
    blocks = lay_out(group_sizes_E, len(x_MD), settings.cut.rows)
    visits, made = (blocks.expert_Z, blocks.number), []
    for w in ws:
        x_ZXD = x_MD[blocks.row_ZX]
        made.append(settings.blocks(settings.cut, settings.interpret, x_ZXD, *with_groups(w), visits))

    def of_rows(y_ZXF):
        y_MF = y_ZXF.astype(x_MD.dtype).reshape(-1, y_ZXF.shape[-1])[blocks.place_M]
        return jnp.where(blocks.owned_M[:, None], y_MF, 0)

    return tuple(of_rows(y_ZXF) for y_ZXF in finish(*made))


def turns_of(E: int, wide: int) -> int:
    """In how many turns matrices of `wide` bytes are dequantised."""
    return -(-E // max(1, WIDENED // wide))


def _dequantised(settings, xs, ws, group_sizes_E, *, transpose_w, finish, results):
    (M, dtype), (E, F) = (len(xs[0]), xs[0].dtype), (len(group_sizes_E), ws[0].shape[1 if transpose_w else 2])
    multiply = functools.partial(settings.wide, transpose_w=transpose_w, finish=finish, results=results)
    turns = turns_of(E, len(ws) * math.prod(ws[0].shape[1:]) * dtype.itemsize)
    n = -(-E // turns)

    def turn(i, outs):
        first = jnp.minimum(i * n, E - n)  # the last turn reaches back; computing a row twice does no harm
        of_turn = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=n)
        wide = [
            settings.dequantise(settings.interpret, dtype, n, first, *with_groups(w))
            if isinstance(w, Scaled)
            else of_turn(w).astype(dtype)
            for w in ws
        ]
        before, sizes_n = jnp.sum(jnp.where(jnp.arange(E) < first, group_sizes_E, 0)), of_turn(group_sizes_E)
        made = multiply(settings.settings, xs, wide, sizes_n, before=before)
        row_M1 = jnp.arange(M)[:, None]
        mine_M1 = (before <= row_M1) & (row_M1 < before + jnp.sum(sizes_n))
        return tuple(jnp.where(mine_M1, y, out) for y, out in zip(made, outs, strict=True))

    return lax.fori_loop(0, turns, turn, (jnp.zeros((M, F), dtype),) * results)


grouped_matmul, grouped_swiglu = with_gradients(_products, None)


# ---------------------------------------------------------------------- counted work


class Form(NamedTuple):
    """How matrices [E, F, D] are stored."""

    bits: int
    group: int | None  # inputs; None for a scale for each output
    offset: bool

    @property
    def values(self):
        return jnp.int4 if self.bits == 4 else jnp.int8

    def groups(self, D: int) -> int:
        return D // (self.group or D)

    def factor_bytes(self, D: int, F: int) -> int:
        """Of one matrix."""
        return 4 * (1 + self.offset) * F * self.groups(D)


def count_blocks(
    form: Form, X, memory, M, D, F, group_sizes_E, item, *, products=1, x_reads=1, parts=1, together=1
) -> Count:
    """Of blocks of X rows: a kernel multiplies every row `products` times, reads it `x_reads` times, and writes `parts`
    sums of it. The copy of the rows into blocks, and that of the sums out of them, are counted too. The factors of
    `together` matrices are read at once.
    """
    sizes_E = np.asarray(group_sizes_E)
    rows, (experts,) = X * int(np.sum(-(-sizes_E // X))), np.nonzero(sizes_E)
    x, sums = (M + (1 + x_reads) * rows) * D * item, 2 * 4 * parts * rows * F
    factors = together * len(np.unique(experts // together)) * form.factor_bytes(D, F)
    moved = len(experts) * D * F * form.bits // 8 + factors + x + sums + M * F * item
    return Count(2 * products * rows * D * F, moved, memory)


def count_dequantised(form: Form, wide: Count, M, E, D, F, item) -> Count:
    """Of matrices dequantised in turns, with their products, `wide`: integers are read, matrices are written, and each
    turn adds its rows to the result.
    """
    matrix = D * F * item
    moved = E * (D * F * form.bits // 8 + form.factor_bytes(D, F) + matrix) + 3 * turns_of(E, matrix) * M * F * item
    return wide._replace(hbm_bytes=wide.hbm_bytes + moved)
