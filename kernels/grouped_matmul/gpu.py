# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products for Hopper GPUs (Pallas, Mosaic GPU).

Two kernels make everything. In both the chip's multiprocessors run one program each, and a program walks its share of
the tiles of the result. It has three warpgroups with two roles, which synchronise only through barriers in shared
memory (SMEM):

    producer        for each tile, for each step of the contraction: when a stage of the ring is empty, have the copy
                    engine (TMA) fill it with a block of either operand
    two consumers   for each tile, for each step: when the stage is full, multiply what is in it (wgmma), 64 rows of the
                    tile each, and call it empty; after the last step write the sums to memory

The producer runs ahead into the next tile, so the tensor cores wait for memory neither inside a tile nor between tiles.
It needs few registers and gives the others to the consumers, whose sums (64 x 256 in float32) fill half of theirs.
Results leave through SMEM, in chunks of 64 columns, while the next tile is begun: room for a whole tile of them and
three stages are better than four stages and a wait for every chunk.

* `_product_kernel` makes x w: forward, and the gradient of x with w the other way round; wgmma reads either orientation
  of w, so nothing is ever transposed in memory. Rows are cut into tiles per expert, beginning at a multiple of 8 at or
  before its first row: the copy engine takes any such row, and a tile never has two experts' rows to multiply. (TPUs,
  whose tiles lie at multiples of their size, take the list in tiles.py; this one has half as many tiles with a border
  inside.) A tile whose rows are all its own leaves through TMA at once; from one at either end of a group, which also
  holds neighbours' rows, only its own are copied, eight or one at a time.

* `_weight_gradient_kernel` makes left^T right of the rows of each expert. The first and the last block of its rows may
  hold others' rows too; the consumers zero these in SMEM before they multiply.

silu(x gate^T) * (x up^T) keeps two sums side by side and reads each block of x once; its gradient of x,
dg gate + du up, is one sum over a contraction twice as long.

M rows, D width in, F width out, E experts, Z entries of the list: tiles of rows. In the weight gradient A is the
width of the left factor and C of the right one: the result is [E, A, C].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..counts import Count
from ..target import Target, block_sizes, require
from ..weight_only_matmul import gpu as weight_only
from . import integers
from .blocks import BLOCKS, shape_class
from .gradients import Scaled, with_gradients

SHARED_MEMORY = 226 * 2**10  # bytes that one program may plan with, of 227 KiB
WARPGROUP_ROWS = 64  # rows of one wgmma
ALIGNED = 8  # rows: the height of the cells in which TMA and wgmma want a block of memory laid out
CHUNK = 64  # columns that are written to memory at a time, and the width of those cells: 128 bytes
CELLS = (plgpu.TilingTransform((ALIGNED, CHUNK)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, **blocks):
    """Returns [M, F] in x's dtype. `blocks` replace entries of the table in blocks.py."""
    if isinstance(w, Scaled):
        return integers.grouped_matmul(_for_integers(x_MD, w), True, x_MD, w, group_sizes_E.astype(jnp.int32))
    settings = _settings(x_MD, w, blocks)
    return _matmul(settings, transpose_w, x_MD, w, group_sizes_E.astype(jnp.int32))


def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, **blocks):
    """Returns [M, F] in x's dtype; both products and silu are one kernel, of integers two."""
    if isinstance(gate_EFD, Scaled):
        settings = _for_integers(x_MD, gate_EFD, up_EFD)
        return integers.grouped_swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))
    settings = _settings(x_MD, gate_EFD, blocks)
    if up_EFD.dtype != gate_EFD.dtype:
        raise NotImplementedError(f"needs gate and up of one dtype, got {gate_EFD.dtype} and {up_EFD.dtype}")
    return _swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))


class Settings(NamedTuple):
    """What a kernel is compiled for; static."""

    tile: int  # x w: rows of a tile, 64 per consumer
    width: int  # x w: columns of a consumer's sums, all products together
    left: int  # weight gradient: columns of left in a tile, 64 per consumer
    right: int  # weight gradient: columns of right in a tile
    depth: int  # how far one step of the contraction goes
    stages: int  # of the ring, at most
    programs: int  # one per multiprocessor
    interpret: Any


def _settings(x_MD, w, blocks) -> Settings:
    on = require("gpu", ("hopper",))
    if x_MD.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 (float32 goes to 'xla'), got {x_MD.dtype} and {w.dtype}")
    if 0 in x_MD.shape or 0 in w.shape or any(width % CHUNK for width in w.shape[1:]):
        raise NotImplementedError(f"needs rows, and widths that are multiples of {CHUNK}, got {x_MD.shape}, {w.shape}")
    return _settings_for(on, x_MD.shape[0], w.shape[0], {"programs": _multiprocessors(on), **blocks})


def _for_integers(x_MD, *ws) -> integers.Settings:
    G, M = integers.groups_of(ws), x_MD.shape[0]
    settings = _settings(x_MD, jax.ShapeDtypeStruct(ws[0].shape, x_MD.dtype), {})
    on = require("gpu")
    cut = _cut_for_integers(on, M, ws[0].shape, G, ws[0].values.dtype)
    if cut is not None:
        weight_only.check_jax()
    return integers.Settings(weight_only.multiply_blocks, cut, on.interpret, integers.dequantise, _products, settings)


def _cut_for_integers(on, M, shape, G, values):
    """How blocks of rows are multiplied by integers [E, F, D]; None for many rows of each expert."""
    E, F, D = shape
    rows, form = integers.block_rows(M, E, ALIGNED, weight_only.MOST_ROWS), weight_only.check(F, D, G, values)
    return rows and weight_only.choose_cut(on, rows, *form, visits=min(M, E))


def _settings_for(on: Target, M, E, blocks) -> Settings:
    sizes = block_sizes(BLOCKS, on, "fewest" if M < E else shape_class(M, E))
    return Settings(**{**sizes, **blocks}, interpret=on.interpret)


def _multiprocessors(on: Target) -> int:
    if on.interpret:
        return 2  # the interpreter runs programs one after the other
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].core_count if device is None else device.num_cores


# ---------------------------------------------------------------------- x w


class Visits(NamedTuple):
    """Tiles v < number of rows, experts ascending; the rows after the last group are those of an expert number E.

    Tile v begins at row first_Z[v], a multiple of 8, and rows begin_Z[v] <= row < end_Z[v], counted from there, are its
    own: they belong to expert expert_Z[v].
    """

    expert_Z: jax.Array  # int32, as all of them
    first_Z: jax.Array
    begin_Z: jax.Array
    end_Z: jax.Array
    number: jax.Array  # int32 [1]


def capacity(M: int, E: int, tile: int) -> int:
    """The most tiles that any group sizes can make: a group of g rows takes (g + 7 + tile - 1) // tile at most."""
    return min(M, (M + (E + 1) * (tile + ALIGNED - 2)) // tile)


@functools.partial(jax.jit, static_argnums=(1, 2))
def plan(group_sizes_E, M: int, tile: int, before=0) -> Visits:
    """The list for M > 0 rows, without the first `before`. Groups that run over M are cut there."""
    E = group_sizes_E.shape[0]
    end = jnp.minimum(before + jnp.cumsum(group_sizes_E, dtype=jnp.int32), M)
    end = jnp.append(end, jnp.int32(M))  # [E + 1]: the last are rows of no expert
    begin = jnp.append(jnp.int32(before), end[:-1])
    first = begin // ALIGNED * ALIGNED
    stop = jnp.cumsum(jnp.where(begin < end, -(-(end - first) // tile), 0), dtype=jnp.int32)
    start = jnp.append(jnp.int32(0), stop[:-1])

    v = jnp.arange(capacity(M, E, tile), dtype=jnp.int32)
    expert_Z = jnp.minimum(jnp.sum(stop <= v[:, None], axis=1, dtype=jnp.int32), E)
    first_Z = first[expert_Z] + (v - start[expert_Z]) * tile
    begin_Z, end_Z = (jnp.clip(x[expert_Z] - first_Z, 0, tile) for x in (begin, end))
    return Visits(expert_Z, first_Z, begin_Z, end_Z, stop[-1:])


class Cut(NamedTuple):
    """How one kernel cuts its work, from static sizes."""

    block: tuple[int, ...]  # rows and columns of a tile, depth of a step
    across: tuple[int, ...]  # tiles of the result side by side
    steps: int  # of one contraction over D; 0 where it follows the group sizes
    slots: int  # chunks of the result that may be on their way out at once; divides the chunks of a tile
    stages: int
    shared_memory: int  # bytes

    @property
    def consumers(self) -> int:
        return self.block[0] // WARPGROUP_ROWS


def product_cut(settings: Settings, M, D, F, *, products=1, side_by_side=1, results=1) -> Cut:
    rows, width, depth = settings.tile, min(settings.width // side_by_side, F), min(settings.depth, D)
    steps = -(-D // depth) * (products // side_by_side)
    stage = (rows + side_by_side * width) * depth
    return _fit(settings, (rows, width, depth), (-(-F // width),), steps, stage, results * width // CHUNK, parts=1)


def gradient_cut(settings: Settings, A: int, C: int) -> Cut:
    left, right, depth = min(settings.left, A), min(settings.right, C), settings.depth
    across = -(-A // left), -(-C // right)
    return _fit(settings, (left, right, depth), across, 0, (left + right) * depth, right // CHUNK, parts=0)


def _fit(settings, block, across, steps, stage, chunks, parts) -> Cut:
    """As many stages as fit beside the buffers through which results leave; bfloat16, and two barriers of 8 bytes."""
    slots = next(n for n in (4, 3, 2, 1) if chunks % n == 0)
    stage, stores = 2 * stage + 16, 2 * (slots + parts) * block[0] * CHUNK
    stages = min(settings.stages, (SHARED_MEMORY - stores) // stage)
    return Cut(block, across, steps, slots, stages, stages * stage + stores)


def _product_kernel(
    expert_Z, first_Z, begin_Z, end_Z, number, *refs, cut, E, inputs, products, results, transpose_w, finish
):
    x_refs, w_refs, out_refs = refs[:inputs], refs[inputs : inputs + products], refs[inputs + products :][:results]
    x_smem, w_smem, whole_smem, part_smem, full, empty = refs[inputs + products + results :]
    (rows, width, depth), (across,), consumers = cut.block, cut.across, cut.consumers
    # One x for all products: sums side by side. One for each: the products follow each other into the same sums.
    side_by_side = products // inputs
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    warpgroup = lax.axis_index("warpgroup")

    def each_of_my_tiles(do):
        """do(visit, first column, steps, blocks used up before). Tiles of one visit are neighbours, and so are those of
        one expert: what runs at the same time reads the same rows and the same matrix, out of the L2 cache.
        """

        def tile(i, _):
            at = program + i * programs
            v = lax.div(at, across)
            # Nobody's rows come last, so all tiles before this one took all their steps.
            do(v, lax.rem(at, across) * width, jnp.where(expert_Z[v] < E, cut.steps, 0), i * cut.steps)

        lax.fori_loop(0, lax.div(number[0] * across - program + programs - 1, programs), tile, None)

    @pl.when(warpgroup == consumers)
    def _produce():
        if consumers > 1:
            plgpu.set_max_registers(40, action="decrease")

        def load(v, column, steps, used):
            row, e = pl.multiple_of(first_Z[v], ALIGNED), expert_Z[v]
            columns, loaded = pl.ds(column, width), min(rows, x_refs[0].shape[0])

            def step(x_ref, w_refs, first, d, _):
                stage = lax.rem(used + first + d, cut.stages)

                @pl.when(used + first + d >= cut.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                inner = pl.ds(d * depth, depth)
                # Rows and columns beyond the end of an array arrive as zeros.
                x_rows = x_ref.at[pl.ds(row, loaded), inner]
                plgpu.copy_gmem_to_smem(x_rows, x_smem.at[stage, pl.ds(0, loaded)], full.at[stage])
                for p, w_ref in enumerate(w_refs):
                    block = w_ref.at[e, columns, inner] if transpose_w else w_ref.at[e, inner, columns]
                    plgpu.copy_gmem_to_smem(block, w_smem.at[stage, p], full.at[stage])

            each = lax.div(steps, inputs)
            for i, x_ref in enumerate(x_refs):
                ws = w_refs[i * side_by_side : (i + 1) * side_by_side]
                lax.fori_loop(0, each, functools.partial(step, x_ref, ws, i * each), None)

        each_of_my_tiles(load)

    @pl.when(warpgroup < consumers)
    def _consume():
        if consumers > 1:
            plgpu.set_max_registers(232, action="increase")
        top = pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def multiply_and_store(v, column, steps, used):
            # Which of this consumer's rows are the tile's own.
            row = pl.multiple_of(first_Z[v], ALIGNED) + top
            begin, end = jnp.maximum(begin_Z[v] - top, 0), jnp.minimum(end_Z[v] - top, WARPGROUP_ROWS)
            whole = (begin == 0) & (end == WARPGROUP_ROWS)

            def multiply(*sums):
                def step(d, _):
                    stage = lax.rem(used + d, cut.stages)
                    plgpu.barrier_wait(full.at[stage])
                    x = x_smem.at[stage, pl.ds(top, WARPGROUP_ROWS)]
                    for p, sum in enumerate(sums):
                        w = w_smem.at[stage, p]
                        plgpu.wgmma(sum, x, w.transpose((1, 0)) if transpose_w else w)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[stage])

                lax.fori_loop(0, steps, step, None)
                return [sum[...] for sum in sums]

            sums = pl.run_scoped(multiply, *[plgpu.ACC((WARPGROUP_ROWS, width))] * side_by_side)

            def store(y, out, slot):
                """Writes 64 rows of 64 columns, or those that are the tile's own."""

                @pl.when(whole)
                def _():
                    plgpu.wait_smem_to_gmem(cut.slots - 1, wait_read_only=True)  # what was in this slot has left
                    whole_smem[warpgroup, slot] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(whole_smem.at[warpgroup, slot], out.at[pl.ds(row, WARPGROUP_ROWS)])

                @pl.when((begin < end) & ~whole)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    part_smem[warpgroup] = y
                    plgpu.commit_smem()

                    def copy(n, i, _):
                        here, there = pl.ds(i * n, n), pl.ds(row + i * n, n)
                        plgpu.copy_smem_to_gmem(part_smem.at[warpgroup, here], out.at[there])

                    # Eight rows at a time between multiples of eight, and one by one before and after.
                    first, last = lax.div(begin + ALIGNED - 1, ALIGNED), lax.div(end, ALIGNED)
                    before = jnp.minimum(first * ALIGNED, end)
                    lax.fori_loop(begin, before, functools.partial(copy, 1), None)
                    lax.fori_loop(first, last, functools.partial(copy, ALIGNED), None)
                    lax.fori_loop(jnp.maximum(last * ALIGNED, before), end, functools.partial(copy, 1), None)

            for c in range(0, width, CHUNK):
                made = finish(*(sum[:, c : c + CHUNK] for sum in sums))
                for r, (out_ref, y) in enumerate(zip(out_refs, made, strict=True)):
                    slot = (c // CHUNK * results + r) % cut.slots
                    store(y.astype(out_ref.dtype), out_ref.at[:, pl.ds(column + c, CHUNK)], slot)

        each_of_my_tiles(multiply_and_store)
        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("transpose_w", "finish", "results"))
def _products(settings, xs, ws, group_sizes_E, before=0, *, transpose_w, finish, results):
    """As with_gradients wants it: `results` arrays [M, F] in x's dtype. The first `before` rows are those of experts
    that are not in ws, and may hold anything.
    """
    (M, D), dtype = xs[0].shape, xs[0].dtype
    E, F = ws[0].shape[0], ws[0].shape[1 if transpose_w else 2]
    side_by_side = len(ws) // len(xs)
    cut = product_cut(settings, M, D, F, products=len(ws), side_by_side=side_by_side, results=results)
    (rows, width, depth), consumers = cut.block, cut.consumers
    filling = -M % ALIGNED
    xs = [jnp.pad(x, ((0, filling), (0, 0))) if filling else x for x in xs]

    visits = plan(group_sizes_E, M, rows, before)
    w_blocks = (cut.stages, side_by_side, *((width, depth) if transpose_w else (depth, width)))
    made = plgpu.kernel(
        functools.partial(
            _product_kernel,
            cut=cut,
            E=E,
            inputs=len(xs),
            products=len(ws),
            results=results,
            transpose_w=transpose_w,
            finish=finish,
        ),
        out_type=[jax.ShapeDtypeStruct((M + filling, F), dtype)] * results,
        scratch_types=[
            plgpu.SMEM((cut.stages, rows, depth), dtype, transforms=CELLS),
            plgpu.SMEM(w_blocks, dtype, transforms=CELLS),
            plgpu.SMEM((consumers, cut.slots, WARPGROUP_ROWS, CHUNK), dtype, transforms=CELLS),
            plgpu.SMEM((consumers, WARPGROUP_ROWS, CHUNK), dtype),  # no cells: single rows can be named
            plgpu.Barrier(num_arrivals=1 + side_by_side, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=cut.stages),
        ],
        grid=(min(settings.programs, visits.expert_Z.shape[0] * cut.across[0]),),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=settings.interpret,
        kernel_name="grouped_product",
    )(*visits, *xs, *ws)
    return tuple(y[:M] for y in made)


# ---------------------------------------------------------------------- left^T right


@functools.partial(jax.jit, static_argnums=(1, 2))
def row_blocks(group_sizes_E, M: int, depth: int):
    """(begin_E, end_E, steps_E): each expert's rows, and how many blocks of `depth`, from an aligned row, hold them."""
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), M)
    begin_E = jnp.append(jnp.int32(0), end_E[:-1])
    steps_E = -(-(end_E - begin_E // ALIGNED * ALIGNED) // depth)
    return begin_E, end_E, jnp.where(begin_E < end_E, steps_E, 0)


def _weight_gradient_kernel(begin_E, end_E, steps_E, left_ref, right_ref, out_ref, *scratch, cut):
    left_smem, right_smem, out_smem, full, empty, zeroed = scratch
    (left, right, depth), (down, across), consumers = cut.block, cut.across, cut.consumers
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    warpgroup = lax.axis_index("warpgroup")

    def each_of_my_tiles(do):
        """do(expert, first column of left, of right, first row, steps, blocks used up before)."""

        def tile(i, used):
            at = program + i * programs
            e, at = lax.div(at, down * across), lax.rem(at, down * across)
            first = lax.div(begin_E[e], ALIGNED) * ALIGNED
            do(e, lax.div(at, across) * left, lax.rem(at, across) * right, first, steps_E[e], used)
            return used + steps_E[e]

        tiles = begin_E.shape[0] * down * across
        lax.fori_loop(0, lax.div(tiles - program + programs - 1, programs), tile, 0)

    @pl.when(warpgroup == consumers)
    def _produce():
        if consumers > 1:
            plgpu.set_max_registers(40, action="decrease")

        def load(_, a, c, first, steps, used):
            def step(d, _):
                stage = lax.rem(used + d, cut.stages)

                @pl.when(used + d >= cut.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                rows = pl.ds(pl.multiple_of(first + d * depth, ALIGNED), depth)
                plgpu.copy_gmem_to_smem(left_ref.at[rows, pl.ds(a, left)], left_smem.at[stage], full.at[stage])
                plgpu.copy_gmem_to_smem(right_ref.at[rows, pl.ds(c, right)], right_smem.at[stage], full.at[stage])

            lax.fori_loop(0, steps, step, None)

        each_of_my_tiles(load)

    @pl.when(warpgroup < consumers)
    def _consume():
        if consumers > 1:
            plgpu.set_max_registers(232, action="increase")
        top = pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def multiply_and_store(e, a, c, first, steps, used):
            def zero_rows_of_others(block, row):
                at = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, block.shape, 0), plgpu.Layout.WGMMA) + row
                mine, x = (begin_E[e] <= at) & (at < end_E[e]), block[...]
                block[...] = jnp.where(mine, x, jnp.zeros_like(x))

            def multiply(sum):
                def step(d, _):
                    stage = lax.rem(used + d, cut.stages)
                    plgpu.barrier_wait(full.at[stage])
                    x = left_smem.at[stage, :, pl.ds(top, WARPGROUP_ROWS)]

                    # Both factors, as others' rows may hold anything. Of right, which all share, each takes a part.
                    @pl.when((d == 0) | (d == steps - 1))
                    def _():
                        zero_rows_of_others(x, first + d * depth)
                        for k in range(0, right, CHUNK * consumers):

                            @pl.when(k + top < right)
                            def _(k=k):
                                part = right_smem.at[stage, :, pl.ds(k + top, CHUNK)]
                                zero_rows_of_others(part, first + d * depth)

                        plgpu.commit_smem()
                        plgpu.barrier_arrive(zeroed)
                        plgpu.barrier_wait(zeroed)

                    plgpu.wgmma(sum, x.transpose((1, 0)), right_smem.at[stage])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[stage])

                lax.fori_loop(0, steps, step, None)
                return sum[...]

            sum = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, right)))
            for k in range(0, right, CHUNK):
                slot = out_smem.at[warpgroup, k // CHUNK % cut.slots]
                plgpu.wait_smem_to_gmem(cut.slots - 1, wait_read_only=True)  # what was in this slot has left
                slot[...] = sum[:, k : k + CHUNK].astype(out_smem.dtype)
                plgpu.commit_smem()
                at = (e, pl.ds(a + top, WARPGROUP_ROWS), pl.ds(c + k, CHUNK))
                plgpu.copy_smem_to_gmem(slot, out_ref.at[at])

        each_of_my_tiles(multiply_and_store)
        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _weight_gradient(settings, left_MA, right_MC, group_sizes_E, dtype):
    """left^T right within each expert's rows: [E, A, C], zeros for an expert without rows."""
    (M, A), C, E = left_MA.shape, right_MC.shape[1], group_sizes_E.shape[0]
    cut = gradient_cut(settings, A, C)
    (left, right, depth), consumers = cut.block, cut.consumers
    # A block is never higher than the arrays it is cut from, and cells are whole.
    filling = ((0, max(-M % ALIGNED, depth - M)), (0, 0))
    if filling[0][1]:
        left_MA, right_MC = jnp.pad(left_MA, filling), jnp.pad(right_MC, filling)
    return plgpu.kernel(
        functools.partial(_weight_gradient_kernel, cut=cut),
        out_type=jax.ShapeDtypeStruct((E, A, C), dtype),
        scratch_types=[
            plgpu.SMEM((cut.stages, depth, left), dtype, transforms=CELLS),
            plgpu.SMEM((cut.stages, depth, right), dtype, transforms=CELLS),
            plgpu.SMEM((consumers, cut.slots, WARPGROUP_ROWS, CHUNK), dtype, transforms=CELLS),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=consumers),
        ],
        grid=(min(settings.programs, E * cut.across[0] * cut.across[1]),),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=settings.interpret,
        kernel_name="grouped_weight_gradient",
    )(*row_blocks(group_sizes_E, M, depth), left_MA, right_MC)


_matmul, _swiglu = with_gradients(_products, _weight_gradient)


# ---------------------------------------------------------------------- counted work


def count(M, E, D, F, *, on: Target, matrices=1, which="forward", group_sizes_E=None, **blocks) -> Count:
    """Of grouped_matmul, or with two matrices of grouped_swiglu. `which` is "forward", "backward" or "step" (both).

    Groups are equal if not given.
    """
    settings = _settings_for(on, M, E, {"programs": 1, **blocks})
    if group_sizes_E is None:
        group_sizes_E = np.full(E, M // E) + (np.arange(E) < M % E)
    sizes_E = np.asarray(group_sizes_E)
    kept = matrices if which == "step" and matrices > 1 else 0  # results that only the backward pass needs
    forward = [_count_products(settings, sizes_E, M, D, F, inputs=1, products=matrices, results=1 + kept)]
    backward = [
        _count_products(settings, sizes_E, M, F, D, inputs=matrices, products=matrices, results=1),
        *[_count_weight_gradient(settings, sizes_E, M, F, D)] * matrices,
    ]
    if matrices > 1:  # from g, u and dh to dg and du, in plain XLA
        backward.append(Count(0, 5 * 2 * M * F, 0))
    kernels = {"forward": forward, "backward": backward, "step": forward + backward}[which]
    return Count(
        sum(k.flops for k in kernels), sum(k.hbm_bytes for k in kernels), max(k.fast_memory_bytes for k in kernels)
    )


def count_integers(M, E, D, F, *, on: Target, form: integers.Form, group_sizes_E) -> Count:
    """Of grouped_matmul with matrices of integers."""
    cut = _cut_for_integers(on, M, (E, F, D), form.groups(D), form.values)
    if cut is not None:
        return integers.count_blocks(form, cut.rows, cut.memory, M, D, F, group_sizes_E, 2, parts=cut.parts)
    settings = _settings_for(on, M, E, {"programs": 1})
    wide = _count_products(settings, np.asarray(group_sizes_E), M, D, F, inputs=1, products=1, results=1)
    return integers.count_dequantised(form, wide, M, E, D, F, 2)


def _count_products(settings, sizes_E, M, D, F, *, inputs, products, results) -> Count:
    side_by_side = products // inputs
    cut = product_cut(settings, M, D, F, products=products, side_by_side=side_by_side, results=results)
    (rows, width, depth), E = cut.block, len(sizes_E)
    visits = jax.tree.map(np.asarray, plan(jnp.asarray(sizes_E, jnp.int32), M, rows))
    expert_Z = visits.expert_Z[: visits.number[0]]
    expert_Z = expert_Z[expert_Z < E]
    per_tile = cut.steps * 2 * rows * side_by_side * width * depth
    x, w, y = inputs * len(expert_Z) * min(rows, M) * D, products * len(np.unique(expert_Z)) * D * F, results * M * F
    return Count(len(expert_Z) * cut.across[0] * per_tile, 2 * (x + w + y), cut.shared_memory)


def _count_weight_gradient(settings, sizes_E, M, A, C) -> Count:
    cut = gradient_cut(settings, A, C)
    (left, right, depth), (down, across) = cut.block, cut.across
    _, _, steps_E = (np.asarray(x) for x in row_blocks(jnp.asarray(sizes_E, jnp.int32), M, depth))
    rows = int(steps_E.sum()) * depth
    return Count(
        rows * down * across * 2 * left * right, 2 * (rows * (A + C) + len(sizes_E) * A * C), cut.shared_memory
    )
