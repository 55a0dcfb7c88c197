# SPDX-License-Identifier: Apache-2.0
"""Tiles in memory and registers, and their masks: shared by the attention kernels for Hopper, forward and backward.

What a query may see is an interval of key positions per rotation, so a mask is two comparisons, three with segments.

B batch, A rotations of the query, U integers per query: its span and segment; X = 64 rows of a consumer's tile, Y its
columns.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..masks import Masks, Tokens
from ..visibility import FAR

LOG2E = math.log2(math.e)
ROWS = 64  # of a tile that one warpgroup multiplies: the M of wgmma
# The layout in which wgmma reads bfloat16 from shared memory: bands of 8 rows by 128 bytes, swizzled so that a column
# is spread over all banks.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # a vector along a tile's rows, or columns
COMPILER = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)  # sums along rows stay within a warp


# ---------------------------------------------------------------------- outside the kernels


def pad(x, multiple: int):
    """x [B, tokens, ...] with zeros at the end, to a whole number of tokens' multiples."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def query_spans(masks: Masks, length: int):
    """int32 [B, A, U, length]: first and last key position that a query sees with each rotation, and its segment."""

    def fill(x, value):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value).astype(jnp.int32)

    segments = [] if masks.q.segments is None else [fill(masks.q.segments, 0)]
    pairs = masks._replace(q=Tokens(fill(masks.q.positions, -1), None)).spans()
    return jnp.stack([jnp.stack([*pair, *segments], axis=1) for pair in pairs], axis=1)


def key_numbers(kv: Tokens, length: int):
    """[B, U - 1, length] int32: positions, FAR where padding, so that no interval holds them; segments if any."""
    positions = jnp.where(kv.positions < 0, FAR, kv.positions)
    rows = [(positions, FAR)] if kv.segments is None else [(positions, FAR), (kv.segments, 0)]
    missing = ((0, 0), (0, length - positions.shape[1]))
    return jnp.stack([jnp.pad(x, missing, constant_values=fill).astype(jnp.int32) for x, fill in rows], axis=1)


# ---------------------------------------------------------------------- inside a consumer


def seen(query, key, shape, query_axis):
    """Which pairs of a tile are visible. query: [first, last, (segment)], key: [position, (segment)], each a vector."""
    first, last, *segment = [along(x, query_axis, shape) for x in query]
    position, *other = [along(x, 1 - query_axis, shape) for x in key]
    seen = (first <= position) & (position <= last)
    return seen & (segment[0] == other[0]) if segment else seen


def along(vector, axis, shape):
    """A vector along one axis of a tile, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def left_operand(x_XY, spare):
    """A table of float32 as the left operand of a product: bfloat16 in registers, where wgmma takes it from.

    Pallas's interpreter takes operands from shared memory only: there `spare` is a buffer for it, otherwise None.
    """
    x_XY = x_XY.astype(jnp.bfloat16)
    if spare is None:
        return x_XY
    spare[...] = x_XY
    plgpu.commit_smem()
    return spare


def load(ref, layout):
    """Every vector of ref [U, tokens], straight from device memory, in a register layout."""
    return [plgpu.load(ref.at[u], layout=layout, optimized=False) for u in range(ref.shape[0])]


# ---------------------------------------------------------------------- what a call costs


class Count(NamedTuple):
    """What one call does: counted from the lists, the grids and the buffers that the kernels take."""

    flops: int
    hbm_bytes: int  # out, dq: G heads that share keys read them once, being neighbours; dkdv: none counted as shared
    fast_memory_bytes: int  # shared memory of a program, the largest
    l2_bytes: int  # all that the copy engine moves


def scratch_bytes(scratch) -> int:
    """Shared memory of a program with these scratch buffers; None stands for one that only the interpreter has."""
    barriers = [x for x in scratch if isinstance(x, plgpu.Barrier)]
    arrays = [x for x in scratch if x is not None and x not in barriers]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    return sum(sizes) + sum(8 * int(np.prod(x.num_barriers)) for x in barriers)
