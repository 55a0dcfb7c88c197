# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix products for TPU (Pallas, Mosaic).

Two kernels make everything. Both walk a list of visits (tiles.py), a visit being a tile of rows and an expert that has
rows in it, so the grid is as long as the groups make it and is known only when the kernel starts.

* `_product_kernel` makes x w: forward, and the gradient of x with w transposed. The rows of a visit are multiplied by
the
  expert's matrix over the whole width D in one product, so nothing is accumulated between steps. What does not fit in
  fast memory is cut along F, the outer loop:

      for each panel of F columns:            (shared out among the cores of the chip, where it has two)
          for each visit:                     tile of rows [m, D] and results [m, F panel] come and go by BlockSpec
              first visit of this expert?     wait for its panel [D, F panel], and start fetching the next expert's
              results of the visit's rows = rows times panel

  A panel is read from memory once per expert, not once per visit, and a whole group's time hides its successor's
  arrival: BlockSpecs look only one step ahead, which is why the panels are fetched by hand, into two buffers in turn.
  Rows of other groups in the same tile keep what their own visit has stored: all visits of a tile follow each other, so
  the tile of results stays in fast memory between them. The first visit fills the rest with zeros, which is what rows
  of no expert keep.

* `_weight_gradient_kernel` makes left^T right of the rows of each expert: one accumulator per expert, begun at its
  first visit and stored at its last. Rows of others are masked in both factors, as they may hold anything. An expert
  without rows has one visit that stores zeros.

silu(x gate^T) * (x up^T) takes two panels side by side and one tile of x; its gradient of x, dg gate + du up, takes two
of each and stores one sum. For the backward pass g and u are kept, 2 M F numbers (gradients.py). Under
rematerialisation they live no longer than one layer's backward pass.

M rows, D width in, F width out, E experts, Z entries of the list of visits. In the weight
gradient A is the width of the left factor and C of the right one: the result is [E, A, C].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..counts import Count
from ..target import block_sizes, require
from ..weight_only_matmul import tpu as weight_only
from . import integers, tiles
from .blocks import BLOCKS, TPU_CORES, TPU_MEMORY, shape_class
from .gradients import Scaled, with_gradients

LANES = 128  # width of a register: panels begin at its multiples


def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, **blocks):
    """Returns [M, F] in x's dtype. `blocks` replace entries of the table in blocks.py."""
    if isinstance(w, Scaled):
        return integers.grouped_matmul(_for_integers(x_MD, w), True, x_MD, w, group_sizes_E.astype(jnp.int32))
    settings = _settings(x_MD, w, blocks)
    _must_fit(settings, x_MD, w.shape[1 if transpose_w else 2])
    return _matmul(settings, transpose_w, x_MD, w, group_sizes_E.astype(jnp.int32))


def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, **blocks):
    """Returns [M, F] in x's dtype; both products and silu are one kernel, of integers two."""
    if isinstance(gate_EFD, Scaled):
        settings = _for_integers(x_MD, gate_EFD, up_EFD)
        return integers.grouped_swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))
    settings = _settings(x_MD, gate_EFD, blocks)
    _must_fit(settings, x_MD, gate_EFD.shape[1], products=2)
    if up_EFD.dtype != gate_EFD.dtype:
        raise NotImplementedError(f"needs gate and up of one dtype, got {gate_EFD.dtype} and {up_EFD.dtype}")
    return _swiglu(settings, x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))


class Settings(NamedTuple):
    """What a kernel is compiled for; static."""

    tile: int  # rows of one visit
    panel: int  # columns of a panel, at most
    cores: int  # that share the chip's work
    memory: int  # bytes of fast memory that a kernel may plan with
    interpret: Any


def _settings(x_MD, w, blocks) -> Settings:
    on = require("tpu")
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32) or w.dtype != x_MD.dtype:
        raise NotImplementedError(f"needs bfloat16 or float32, one for x and w, got {x_MD.dtype} and {w.dtype}")
    if 0 in x_MD.shape or 0 in w.shape:
        raise NotImplementedError(f"needs at least one row, expert and column, got {x_MD.shape} and {w.shape}")
    return settings_for(on, x_MD.shape[0], w.shape[0], **blocks)


def _for_integers(x_MD, *ws) -> integers.Settings:
    G, w, M = integers.groups_of(ws), ws[0], x_MD.shape[0]
    settings = _settings(x_MD, jax.ShapeDtypeStruct(w.shape, x_MD.dtype), {})
    _must_fit(settings, x_MD, w.shape[1], products=len(ws))
    cut = _cut_for_integers(require("tpu"), M, w.shape, G, w.values.dtype, w.offset is not None, x_MD.dtype)
    return integers.Settings(
        weight_only.multiply_blocks, cut, settings.interpret, weight_only.dequantise, _products, settings
    )


def _cut_for_integers(on, M, shape, G, values, offset, dtype):
    """How blocks of rows are multiplied by integers [E, F, D]; None for many rows of each expert."""
    E, F, D = shape
    bits, copies = weight_only.check(dtype, D, G, values), max(1, LANES * G // D)  # short groups share a product
    rows = integers.block_rows(M, E, weight_only.SUBLANES, weight_only.MOST_COPIED // copies)
    return rows and weight_only.choose_cut(
        on, rows, F, D, G, bits, offset, dtype, jnp.float32, visits=min(M, E), stack=E
    )


def _must_fit(settings, x_MD, F, products=1):
    """NotImplementedError now, if any kernel of the forward or the backward pass does not fit in fast memory."""
    D, itemsize = x_MD.shape[1], x_MD.dtype.itemsize
    product_panels(settings, D, F, products=products, results=1 if products == 1 else 3, itemsize=itemsize)
    product_panels(settings, F, D, products=products, inputs=products, itemsize=itemsize)
    gradient_panels(settings, D, F, itemsize=itemsize)


def settings_for(on, M, E, **blocks) -> Settings:
    """What the tables of blocks.py say for this device, with entries replaced by `blocks`."""
    sizes = {**block_sizes(BLOCKS, on, shape_class(M, E)), **blocks}
    memory = TPU_MEMORY.get(on.generation, TPU_MEMORY["*"])
    return Settings(min(sizes["tile"], M), sizes["panel"], TPU_CORES.get(on.generation, 1), memory, on.interpret)


def _widths(width, limit):
    """`width` cut into 1, 2, 3, ... panels: the widths of a panel, widest first, that are no wider than `limit`.

    Panels begin at multiples of a register's width. Where there is no other way they are one register wide.
    """
    counts = range(1, max(width // LANES, 1) + 1)
    cut = [width if count == 1 else -(-width // count // LANES) * LANES for count in counts]
    return [w for w in dict.fromkeys(cut) if w <= max(limit, cut[-1])]


def _in_pieces(width, do):
    """do(columns, how many) for pieces of `width` columns one after the other.

    The compiler unrolls a whole product, so a loop is what keeps the program short: a piece is the narrowest part of
    at least 512 columns that is a multiple of the 256 (or 128) columns a matrix unit takes at a time.
    """
    for unit in (2 * LANES, LANES):
        for piece in range(512, width, unit):
            if width % piece == 0:

                @pl.loop(0, width // piece)
                def _(i, piece=piece):
                    do(pl.ds(pl.multiple_of(i * piece, piece), piece), piece)

                return
    do(pl.ds(0, width), width)


# ---------------------------------------------------------------------- x w


class Panels(NamedTuple):
    """How the F columns of a product are cut."""

    width: int
    number: int
    last: int  # width of the last panel
    cores: int  # that share the panels: as many each
    memory: int  # bytes of fast memory that the kernel takes


def product_panels(settings: Settings, D, F, *, products=1, inputs=1, results=1, itemsize=2) -> Panels:
    """The fewest panels that fit: each more reads x once more."""
    tile = settings.tile
    # Copies of a part of a matrix go by whole registers: one that does not end with a register comes whole.
    widths = [F] if F % LANES else _widths(F, settings.panel)
    for cores in sorted({settings.cores, 1}, reverse=True):
        for width in widths:
            count = -(-F // width)
            panels, rows, stores = 2 * products * D * width, 2 * inputs * tile * D, 2 * results * tile * width
            memory = itemsize * (panels + rows + stores) + 4 * products * tile * width
            if count % cores == 0 and memory <= settings.memory:
                return Panels(width, count, F - (count - 1) * width, cores, memory)
    raise NotImplementedError(f"needs matrices of which {widths[-1]} columns fit in {settings.memory} bytes, got D {D}")


def _product_kernel(
    tile_Z, begin_Z, end_Z, run_Z, expert_of_run, runs, *refs, panels, transpose_w, inputs, products, finish, precision
):
    x_refs, w_refs, out_refs = refs[:inputs], refs[inputs : inputs + products], refs[inputs + products : -2]
    buffers, arrived = refs[-2:]  # [2, products, panel of a matrix], and a semaphore for each
    core, i, v = (pl.program_id(axis) for axis in range(3))
    per_core = panels.number // panels.cores
    panel, run = core * per_core + i, run_Z[v]
    first_of_tile = (v == 0) | (tile_Z[jnp.maximum(v - 1, 0)] != tile_Z[v])
    first_of_run = (v == 0) | (run_Z[jnp.maximum(v - 1, 0)] != run)
    # All panels that this core uses, in order: i * runs + run. Even ones go to buffer 0, odd ones to buffer 1.
    turn = i * runs[0] + run
    slot = turn % 2

    def for_width_of(panel, do):
        """do(width), with the width static: the last panel may be narrower."""
        if panels.last == panels.width:
            return do(panels.width)
        pl.when(panel < panels.number - 1)(lambda: do(panels.width))
        pl.when(panel == panels.number - 1)(lambda: do(panels.last))

    def fetch(panel, run, slot, act):
        """Starts, or awaits, the copies of the panel of every matrix."""

        def do(width):
            columns = pl.ds(panel * panels.width, width)
            for p, w_ref in enumerate(w_refs):
                source = w_ref.at[expert_of_run[run]]
                if panels.number > 1:
                    source = source.at[columns] if transpose_w else source.at[:, columns]
                buffer = buffers.at[slot, p]
                if width < panels.width:
                    buffer = buffer.at[pl.ds(0, width)] if transpose_w else buffer.at[:, pl.ds(0, width)]
                act(pltpu.make_async_copy(source, buffer, arrived.at[slot, p]))

        for_width_of(panel, do)

    @pl.when(first_of_run)
    def _():
        @pl.when(turn == 0)
        def _():
            fetch(panel, run, slot, lambda copy: copy.start())

        # The other buffer was last read in the run before this one, and is free.
        more_runs = run + 1 < runs[0]

        @pl.when(more_runs | (i + 1 < per_core))
        def _():
            next_panel, next_run = jnp.where(more_runs, panel, panel + 1), jnp.where(more_runs, run + 1, 0)
            fetch(next_panel, next_run, 1 - slot, lambda copy: copy.start())

        fetch(panel, run, slot, lambda copy: copy.wait())

    @pl.when(first_of_tile)
    def _():
        for out_ref in out_refs:
            out_ref[...] = jnp.zeros_like(out_ref)

    def multiply(columns, count):
        made = []
        for p in range(products):
            w = buffers[slot, p, columns, :] if transpose_w else buffers[slot, p, :, columns]
            contract = (((1,), (1 if transpose_w else 0,)), ((), ()))
            x = x_refs[p % inputs][...]
            made.append(lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32))
        row = lax.broadcasted_iota(jnp.int32, (x.shape[0], count), 0)
        mine = (begin_Z[v] <= row) & (row < end_Z[v])
        if inputs > 1:
            made = [sum(made)]
        for out_ref, y in zip(out_refs, finish(*made), strict=True):
            out_ref[:, columns] = jnp.where(mine, y.astype(out_ref.dtype), out_ref[:, columns])

    @pl.when(begin_Z[v] < end_Z[v])
    def _():
        for_width_of(panel, lambda width: _in_pieces(width, multiply))


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("transpose_w", "finish", "results"))
def _products(settings, xs, ws, group_sizes_E, before=0, *, transpose_w, finish, results):
    """As with_gradients wants it: `results` arrays [M, F] in x's dtype. The first `before` rows are those of experts
    that are not in ws, and may hold anything.
    """
    (M, D), dtype = xs[0].shape, xs[0].dtype
    E, F = ws[0].shape[0], ws[0].shape[1 if transpose_w else 2]
    tile, products, inputs = settings.tile, len(ws), len(xs)
    panels = product_panels(settings, D, F, products=products, inputs=inputs, results=results, itemsize=dtype.itemsize)
    visits = tiles.plan(group_sizes_E, M, tile, before, cover="tiles")
    run_Z, expert_of_run, runs = tiles.runs(visits, E)
    per_core = panels.number // panels.cores

    def rows(core, i, v, tile_Z, *_):
        return tile_Z[v], 0

    def stores(core, i, v, tile_Z, *_):
        return tile_Z[v], core * per_core + i

    out = jax.ShapeDtypeStruct((M, F), dtype)
    panel = (panels.width, D) if transpose_w else (D, panels.width)
    return pl.pallas_call(
        functools.partial(
            _product_kernel,
            panels=panels,
            transpose_w=transpose_w,
            inputs=inputs,
            products=products,
            finish=finish,
            precision=_precision(dtype),
        ),
        out_shape=(out,) * results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(panels.cores, per_core, visits.count),
            in_specs=[pl.BlockSpec((tile, D), rows)] * inputs + [pl.BlockSpec(memory_space=pl.ANY)] * products,
            out_specs=(pl.BlockSpec((tile, panels.width), stores),) * results,
            scratch_shapes=[pltpu.VMEM((2, products, *panel), dtype), pltpu.SemaphoreType.DMA((2, products))],
        ),
        compiler_params=_compiler_params(("parallel", "arbitrary", "arbitrary"), panels.memory),
        interpret=settings.interpret,
        name="grouped_product",
    )(visits.tile_Z, visits.begin_Z, visits.end_Z, run_Z, expert_of_run, runs[None], *xs, *ws)


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _compiler_params(semantics, memory):
    # A quarter more than the buffers that are asked for: tiles are stored padded, and products need room on the way.
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=memory * 5 // 4 + 2**21)


# ---------------------------------------------------------------------- left^T right


class GradientPanels(NamedTuple):
    """One accumulator, a columns of left by c of right; which factor's panels are the outer loop, shared by cores."""

    a: int
    c: int
    outer: str  # "left" or "right"
    memory: int  # bytes of fast memory that the kernel takes


def gradient_panels(settings: Settings, A, C, *, itemsize=2) -> GradientPanels:
    """What fits and costs least: left is read once for every panel of right, and right for every panel of left."""
    tile, fitting = settings.tile, []
    for a in _widths(A, settings.panel):
        for c in _widths(C, settings.panel):
            a_count, c_count = -(-A // a), -(-C // c)
            memory = 8 * a * c + 2 * itemsize * (a * c + tile * (a + c))  # the sums, and the product added to them
            outer = "left" if c_count % settings.cores else "right"
            idle = 1 if a_count * c_count % settings.cores == 0 else settings.cores
            if memory <= settings.memory:
                # Bytes read per row, and the products, some of them padding, of which 256 take as long as a byte.
                cost = idle * (itemsize * (A * c_count + C * a_count) + a * a_count * c * c_count / 256)
                fitting.append((cost, a, c, outer, memory))
    if not fitting:
        raise NotImplementedError(f"needs {LANES} by {LANES} sums in {settings.memory} bytes of fast memory")
    return GradientPanels(*min(fitting)[1:])


def _weight_gradient_kernel(expert_Z, _, begin_Z, end_Z, count, left_ref, right_ref, out_ref, sum_ref, *, precision):
    v = pl.program_id(2)
    begin, end = begin_Z[v], end_Z[v]
    first = (v == 0) | (expert_Z[jnp.maximum(v - 1, 0)] != expert_Z[v])
    last = (v == count[0] - 1) | (expert_Z[jnp.minimum(v + 1, count[0] - 1)] != expert_Z[v])

    def clear(rows, count):
        sum_ref[rows, :] = jnp.zeros((count, sum_ref.shape[1]), jnp.float32)

    def store(rows, _):
        out_ref[rows, :] = sum_ref[rows, :].astype(out_ref.dtype)

    pl.when(first)(lambda: _in_pieces(sum_ref.shape[0], clear))

    def add(mask):
        def multiply(columns, _):
            left, right = mask(left_ref[:, columns]), mask(right_ref[...])
            sum_ref[columns, :] += lax.dot_general(
                left, right, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )

        _in_pieces(left_ref.shape[1], multiply)

    def mine_only(x):
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where((begin <= row) & (row < end), x, 0)

    whole = end - begin == left_ref.shape[0]
    pl.when(whole)(lambda: add(lambda x: x))
    pl.when((begin < end) & ~whole)(lambda: add(mine_only))

    pl.when(last)(lambda: _in_pieces(sum_ref.shape[0], store))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _weight_gradient(settings, left_MA, right_MC, group_sizes_E, dtype):
    """left^T right within each expert's rows: [E, A, C], zeros for an expert without rows."""
    (M, A), C, E = left_MA.shape, right_MC.shape[1], group_sizes_E.shape[0]
    tile = settings.tile
    panels = gradient_panels(settings, A, C, itemsize=dtype.itemsize)
    visits = tiles.plan(group_sizes_E, M, tile, cover="experts")
    counts = pl.cdiv(A, panels.a), pl.cdiv(C, panels.c)
    # of grid indices: (panel of left, panel of right)
    panel = (lambda p, q: (p, q)) if panels.outer == "left" else (lambda p, q: (q, p))
    return pl.pallas_call(
        functools.partial(_weight_gradient_kernel, precision=_precision(dtype)),
        out_shape=jax.ShapeDtypeStruct((E, A, C), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(*panel(*counts), visits.count),
            in_specs=[
                pl.BlockSpec((tile, panels.a), lambda p, q, v, expert_Z, tile_Z, *_: (tile_Z[v], panel(p, q)[0])),
                pl.BlockSpec((tile, panels.c), lambda p, q, v, expert_Z, tile_Z, *_: (tile_Z[v], panel(p, q)[1])),
            ],
            out_specs=pl.BlockSpec(
                (None, panels.a, panels.c), lambda p, q, v, expert_Z, *_: (expert_Z[v], *panel(p, q))
            ),
            scratch_shapes=[pltpu.VMEM((panels.a, panels.c), jnp.float32)],
        ),
        compiler_params=_compiler_params(("parallel", "arbitrary", "arbitrary"), panels.memory),
        interpret=settings.interpret,
        name="grouped_weight_gradient",
    )(*visits[:4], visits.count[None], left_MA, right_MC)


_matmul, _swiglu = with_gradients(_products, _weight_gradient)


# ---------------------------------------------------------------------- counted work


def _visited_tiles(visits) -> int:
    """Entries that multiply; those that only cover something do not."""
    return int(np.count_nonzero(np.asarray(visits.begin_Z) < np.asarray(visits.end_Z)))


def count_product(settings, M, D, F, group_sizes_E, *, products=1, inputs=1, results=1, itemsize=2) -> Count:
    """One call of `_products`."""
    panels = product_panels(settings, D, F, products=products, inputs=inputs, results=results, itemsize=itemsize)
    visits = tiles.plan(group_sizes_E, M, settings.tile, cover="tiles")
    rows = _visited_tiles(visits) * settings.tile
    runs = int(tiles.runs(visits, group_sizes_E.shape[0])[2])
    reads = panels.number if settings.tile < M else panels.cores  # a single tile stays where it is
    numbers = runs * products * D * F + reads * inputs * M * D + results * M * F
    return Count(2 * products * rows * D * F, numbers * itemsize, panels.memory)


def count_weight_gradient(settings, M, A, C, group_sizes_E, *, itemsize=2) -> Count:
    """One call of `_weight_gradient`."""
    panels = gradient_panels(settings, A, C, itemsize=itemsize)
    visits = tiles.plan(group_sizes_E, M, settings.tile, cover="experts")
    rows = _visited_tiles(visits) * settings.tile
    tiles_read = 1 + int(np.count_nonzero(np.diff(np.asarray(visits.tile_Z)[: int(visits.count)])))
    a_count, c_count = -(-A // panels.a), -(-C // panels.c)
    numbers = min(tiles_read * settings.tile, M) * (c_count * A + a_count * C) + group_sizes_E.shape[0] * A * C
    return Count(2 * rows * panels.a * a_count * panels.c * c_count, numbers * itemsize, panels.memory)


def count_integers(M, E, D, F, *, on, form: integers.Form, group_sizes_E, dtype=jnp.bfloat16) -> Count:
    """Of grouped_matmul with matrices of integers."""
    item = jnp.dtype(dtype).itemsize
    cut = _cut_for_integers(on, M, (E, F, D), form.groups(D), form.values, form.offset, dtype)
    if cut is not None:
        sizes = M, D, F, group_sizes_E, item
        together = weight_only.SUBLANES if weight_only.stored_by_group(E, form.groups(D)) else 1
        times = {"products": cut.copies, "x_reads": -(-F // cut.outputs), "together": together}
        return integers.count_blocks(form, cut.rows, cut.memory, *sizes, **times)
    wide = count_product(settings_for(on, M, E), M, D, F, group_sizes_E, itemsize=item)
    return integers.count_dequantised(form, wide, M, E, D, F, item)


def count(M, D, F, group_sizes_E, *, on, itemsize=2, swiglu=False, **blocks) -> dict[str, Count]:
    """grouped_matmul, or grouped_swiglu, from D to F on the device `on`: the work of each pass, kernel by kernel."""
    settings = settings_for(on, M, group_sizes_E.shape[0], **blocks)
    product = functools.partial(count_product, settings, M, group_sizes_E=group_sizes_E, itemsize=itemsize)
    dw = count_weight_gradient(settings, M, F, D, group_sizes_E, itemsize=itemsize)
    if not swiglu:
        return {"forward": product(D, F), "dx": product(F, D), "dw": dw}
    return {
        "forward": product(D, F, products=2),
        "forward, keeping g and u": product(D, F, products=2, results=3),
        "dx": product(F, D, products=2, inputs=2),
        "dgate": dw,
        "dup": dw,
    }
