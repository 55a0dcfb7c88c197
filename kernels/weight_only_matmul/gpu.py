# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with integers in groups for Hopper GPUs (Pallas, Mosaic GPU): every integer is read once.

The product is transposed, y^T = w x^T: wgmma takes rows by 64 but columns by 8, so outputs are its rows, and the rows
of x are filled up to 8, 16, ... A program makes 64 outputs from all inputs, or, where there are few outputs, from a
part of them; XLA adds the parts. It has two warpgroups:

    copier    keeps a ring of stages in shared memory filled (TMA): 64 outputs by DEPTH inputs of the integers, and x
    reader    for each stage: converts the integers to bfloat16, which is exact, into a buffer that wgmma reads; wgmma
              makes one sum for each group; sums += sum of the group * scale - offset * sum of x over the group

wgmma could take the converted integers from registers, which spares shared memory their way there and back; jax's
simulation of the chip (0.12) takes both factors from shared memory only, and a kernel is to be tried there. Scales and
offsets go from memory to registers, two of each per thread and group, and are asked for before the wait for the stage.

Many rows are left to "xla": it writes the weight in bfloat16 once, which costs little beside their product, while this
kernel reads x again for each 64 outputs.

The weight may be one of a stack, chosen at run time for each of several blocks of rows (kernels/grouped_matmul).

M rows, I inputs, O outputs, G groups, X rows filled up to a multiple of 8, P parts, U units: groups, or equal parts of
long ones. E weights of a stack, Z blocks of rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..counts import Count
from ..target import Target, block_sizes, require
from .blocks import BLOCKS
from .gradients import with_gradient

ROWS = 64  # outputs of a program: rows of a wgmma
MOST_ROWS = 64  # of x
COLUMNS = 8  # what wgmma's columns are a multiple of
DEPTH = 256  # inputs of a stage
WIDE = 2 * ROWS * DEPTH  # bytes of a stage's integers in bfloat16
LONGEST = 128  # inputs that are summed before a scale is applied
SHARED_MEMORY = 226 * 2**10  # bytes of a multiprocessor
COPIER, READER = 1, 0  # the warpgroups of a program


def weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG, *, dtype, **blocks):
    """Returns [M, O] in `dtype`. `blocks` replace entries of the table in blocks.py."""
    on = require("gpu", ("hopper",))
    (O, I), G = values_OI.shape, scale_OG.shape[1]
    M = math.prod(x_MI.shape[:-1])
    if x_MI.dtype != jnp.bfloat16:
        raise NotImplementedError(f"needs x in bfloat16, got {x_MI.dtype}")
    cut = choose_cut(on, M, *check(O, I, G, values_OI.dtype), **blocks)
    check_jax()
    static = cut, jnp.dtype(dtype), on.interpret
    return _product(static, x_MI.reshape(M, I), values_OI, scale_OG, offset_OG).reshape(*x_MI.shape[:-1], O)


def check_jax():
    if not hasattr(plgpu, "store"):
        raise NotImplementedError("needs jax 0.12, whose Mosaic GPU stores any layout of registers to GMEM")


def check(O, I, G, values):
    """(O, I, G, bits) of a weight of integers of the dtype `values`; NotImplementedError where it is not taken."""
    if not O or O % ROWS:
        raise NotImplementedError(f"needs outputs that are a multiple of {ROWS}, got {O}")
    if I // G not in (16, 32, 64) and (I // G) % LONGEST:
        raise NotImplementedError(f"needs groups of 16, 32, 64 or a multiple of {LONGEST} inputs, got {I // G}")
    bits = 4 if values == jnp.int4 else 8
    if I * bits % 256:
        raise NotImplementedError(f"needs inputs that are a multiple of {256 // bits} for {bits} bits, got {I}")
    return O, I, G, bits


class Cut(NamedTuple):
    """How the work is cut. All of it is static."""

    rows: int  # of x, filled up
    unit: int  # inputs that are summed before a scale is applied
    group: int  # inputs of a group
    parts: int  # of the inputs, for programs of their own
    stages: int
    memory: int  # bytes of shared memory that a program takes


def choose_cut(on: Target, M, O, I, G, bits, visits=1, **blocks) -> Cut:
    """For M rows, in each of `visits` blocks."""
    if not 0 < M <= MOST_ROWS:
        raise NotImplementedError(f"needs 1 to {MOST_ROWS} rows, got {M}: with more 'xla' dequantises the weight once")
    wanted = {**block_sizes(BLOCKS, on, "few"), **blocks}
    rows, steps = -(-M // COLUMNS) * COLUMNS, -(-I // DEPTH)
    stage = DEPTH * (ROWS * bits // 8 + 2 * rows) + 16  # and two barriers
    parts = max(1, min(-(-wanted["programs"] // (O // ROWS * visits)), steps // wanted["steps"]))
    together = 2 if 2 * (WIDE + wanted["least_stages"] * stage) <= SHARED_MEMORY else 1  # programs of a multiprocessor
    stages = min(wanted["stages"], (SHARED_MEMORY // together - WIDE) // stage)
    return Cut(rows, min(I // G, LONGEST), I // G, parts, stages, WIDE + stages * stage)


def _kernel(x_ref, values_ref, scale_ref, *refs, cut, terms, inputs, stack):
    *refs, out_ref, x_smem, values_smem, wide, filled, drained = refs
    offset_refs, visit_refs = refs[: 2 * (terms - 1)], refs[2 * (terms - 1) :]
    outputs, z = pl.ds(lax.axis_index("tile") * ROWS, ROWS), lax.axis_index("visit")
    part, steps = lax.axis_index("part"), -(-inputs // DEPTH)
    first, end = lax.div(part * steps, cut.parts), lax.div((part + 1) * steps, cut.parts)
    expert = 0
    if stack:
        expert_Z, number = visit_refs
        expert, end = expert_Z[z], jnp.where(z < number[0], end, first)

    @pl.when(lax.axis_index("warpgroup") == COPIER)
    def _copy():
        @pl.loop(0, end - first)
        def _(turn):
            stage = lax.rem(turn, cut.stages)

            @pl.when(turn >= cut.stages)
            def _():
                plgpu.barrier_wait(drained.at[stage])

            rows = pl.ds(pl.multiple_of(z * cut.rows, COLUMNS), cut.rows)
            at = pl.ds((first + turn) * DEPTH, DEPTH)  # inputs beyond the end arrive as zeros
            plgpu.copy_gmem_to_smem(values_ref.at[expert, outputs, at], values_smem.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(x_ref.at[rows, at], x_smem.at[stage], filled.at[stage])

    def along_outputs(s):
        return lax.broadcast_in_dim(s, (ROWS, cut.rows), [0])

    def along_rows(s):
        return lax.broadcast_in_dim(s, (ROWS, cut.rows), [1])

    # Stores to cells of 16 numbers need another layout, to which only 4 bits go from the first.
    stored = plgpu.Layout.WGMMA_UPCAST_2X if cut.unit < 32 else plgpu.Layout.WGMMA_UPCAST_4X
    loaded = plgpu.Layout.WGMMA_UPCAST_4X if values_ref.dtype == jnp.int4 else stored

    @pl.when(lax.axis_index("warpgroup") == READER)
    def _read():
        def load(ref, at, axis):
            return plgpu.load(ref.at[at], layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)

        def step(turn, sums):
            stage, begin = lax.rem(turn, cut.stages), (first + turn) * DEPTH
            factors = []
            for n in range(0, DEPTH, cut.unit):  # of a unit beyond the end: those of the last, for zeros
                group = lax.div(jnp.minimum(begin + n, inputs - 1), cut.group)
                found = [load(scale_ref, (expert, outputs, group), 1)]
                if terms > 1:
                    offset_ref, x_sums_ref = offset_refs
                    unit = lax.div(begin + n, cut.unit)
                    found += [load(offset_ref, (expert, outputs, group), 1), load(x_sums_ref, (z, unit), 0)]
                factors.append(found)
            plgpu.barrier_wait(filled.at[stage])
            # In layouts whose loads of integers and stores of bfloat16 are both wide.
            values = plgpu.layout_cast(values_smem[stage], loaded)
            wide[...] = (values if loaded == stored else plgpu.layout_cast(values, stored)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for number, (scale, *offset) in enumerate(factors):

                def multiply(sum_ref, number=number):
                    cell = min(cut.unit, 64)
                    for at in range(number * cut.unit, (number + 1) * cut.unit, cell):
                        columns = pl.ds(at, cell)
                        plgpu.wgmma(sum_ref, wide.at[:, columns], x_smem.at[stage, :, columns].T)
                    return sum_ref[...]

                made = pl.run_scoped(multiply, plgpu.ACC((ROWS, cut.rows), jnp.float32))
                sums += made * along_outputs(scale)
                if offset:
                    sums -= along_outputs(offset[0]) * along_rows(offset[1])

            @pl.when(turn + cut.stages < end - first)
            def _():
                plgpu.barrier_arrive(drained.at[stage])

            return sums

        start = plgpu.layout_cast(jnp.zeros((ROWS, cut.rows), jnp.float32), plgpu.Layout.WGMMA)
        sums = lax.fori_loop(0, end - first, step, start)
        plgpu.store(out_ref.at[part, z, outputs], sums, optimized=False)


def _cells(width, bits):
    """How TMA and wgmma want a block laid out in shared memory: rows of `width` numbers, swizzled."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * bits // 8)  # type: ignore[abstract]


def multiply_blocks(cut: Cut, interpret, x_ZXI, values_EOI, scale_EOG, offset_EOG=None, visits=()):
    """Blocks of X = cut.rows rows, each times one weight of a stack: float32 [Z, X, O].

    visits: int32 (expert_Z, number [1]): block z < number is multiplied by weight expert_Z[z], and others give zeros;
    nothing where all blocks are multiplied by the first.
    """
    (Z, X, I), O = x_ZXI.shape, values_EOI.shape[1]
    bits = 4 if values_EOI.dtype == jnp.int4 else 8
    args = [x_ZXI.reshape(Z * X, I), values_EOI, scale_EOG]
    if offset_EOG is not None:
        sums_ZUX = jnp.sum(x_ZXI.reshape(Z, X, -1, cut.unit).astype(jnp.float32), axis=-1).swapaxes(1, 2)
        units = -(-I // DEPTH) * DEPTH // cut.unit  # those that stages have room for
        args += [offset_EOG, jnp.pad(sums_ZUX, ((0, 0), (0, units - sums_ZUX.shape[1]), (0, 0)))]
    cells = _cells(min(cut.unit, 64), 16)
    width = next(n for n in (1024 // bits, 512 // bits, 256 // bits) if I % n == 0)
    parts_PZOX = plgpu.kernel(
        functools.partial(_kernel, cut=cut, terms=len(args[2:4]), inputs=I, stack=bool(visits)),
        out_type=jax.ShapeDtypeStruct((cut.parts, Z, O, X), jnp.float32),
        scratch_types=[
            plgpu.SMEM((cut.stages, X, DEPTH), x_ZXI.dtype, transforms=cells),
            plgpu.SMEM((cut.stages, ROWS, DEPTH), values_EOI.dtype, transforms=_cells(width, bits)),
            plgpu.SMEM((ROWS, DEPTH), x_ZXI.dtype, transforms=cells),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            plgpu.Barrier(num_barriers=cut.stages),
        ],
        grid=(O // ROWS, cut.parts, Z),
        grid_names=("tile", "part", "visit"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="weight_only_few",
    )(*args, *visits)
    return jnp.sum(parts_PZOX, axis=0).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=(0,))
def _multiply(static, x_MI, values_OI, scale_OG, offset_OG):
    cut, dtype, interpret = static
    x_XI = jnp.pad(x_MI, ((0, cut.rows - len(x_MI)), (0, 0)))
    stack = [None if s is None else s[None] for s in (values_OI, scale_OG, offset_OG)]
    return multiply_blocks(cut, interpret, x_XI[None], *stack)[0, : len(x_MI)].astype(dtype)


_product = with_gradient(_multiply)


# ---------------------------------------------------------------------- counted work


def count(M, O, I, G, *, on: Target, bits=4, offset=False, **blocks) -> Count:
    """Of one call, with x read from memory once: programs find it in the L2 cache."""
    cut = choose_cut(on, M, O, I, G, bits, **blocks)
    weight = O * I * bits // 8 + 4 * (1 + offset) * O * G
    sums = 4 * cut.parts * O * cut.rows
    return Count(2 * O * I * cut.rows, weight + 2 * cut.rows * I + 2 * sums + 2 * M * O, cut.memory)
