# SPDX-License-Identifier: Apache-2.0
"""Decode attention on Hopper: every key and value that is needed is copied from HBM once, with many copies in flight.

With a few queries per row there is next to nothing to compute, so the kernel is a reader with a softmax attached:

1. Which keys a query sees is an interval of slots [first, end): causality, window, padding and the length of the cache
   are in it. Dual Chunk Attention has three rotations of the query, each with its interval: own chunk, previous, older.
2. A row visits the blocks of keys that its intervals touch, rotation by rotation, and nothing else. A block with a
   chunk boundary inside is visited for both of its rotations; a row has at most two such blocks.
3. The visits of all rows are cut into segments of nearly equal length, one for each of Z programs: one long row fills
   the chip, and so does a batch of long and short ones (flash-decoding, split-K). The cut follows the positions, not S.
4. In a program one warpgroup does nothing but start copies (TMA) into a ring of stages in shared memory; the other
   takes the stages in order and hands them back. Two programs share a multiprocessor, so 6 x 32 KB are on the way.
5. The products are transposed: S^T = K q^T and O^T = V^T P^T. wgmma takes rows by 64 but columns by 8, so keys and
   the head width are its rows, and the queries that share a key head are padded to 8 columns instead of 64 rows.
   The price: the running maximum goes across warps, and P^T goes through shared memory.
6. A paged cache only has a page number read before each copy. int8 is widened between its stage and a buffer that
   wgmma reads; a scale belongs to a slot, so it multiplies one logit or probability and not H numbers.
7. Every program leaves an unnormalised result, its maximum and its sum; a second kernel merges the segments of a row.

B batch, T queries per row, N query heads, K kv heads, G = N / K, H head width, A rotations of the query, X query rows
of a kv head (T * G, filled up to a multiple of 8), S slots of a row, P pages of a row, Y slots of a block, W
rows of a wgmma, Z segments, the entries of the programs' list.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..blockwise import LOWEST
from ..counts import Count
from ..masks import Masks, last_queries
from ..target import block_sizes, require
from ..visibility import CHUNK_REGIONS
from .blocks import BLOCKS
from .cache import Cache

MULTIPROCESSORS = 132  # of an H100 SXM or an H200
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor
RESERVED = 2048  # bytes of it that CUDA, barriers and alignment take per program
TILE = 64  # rows of a wgmma
ROWS = 64  # at most: accumulators of more do not fit in the registers of one warpgroup
FEW_ROWS = 16  # up to which two programs fit in the registers of a multiprocessor
FEW = 1 / 8  # rows (B * K) per program that runs at once, up to which one round of programs is cut evenly enough
ROUNDS = 3  # of programs, where there are more rows, so that rows of different lengths come out even
LONG = 16  # visits of a segment, above which it is worth while to have further rounds: a program takes time to start
MERGED = 128  # X times the segments that are loaded at the same time when they are merged, to wait for memory once
COPIER, READER = 1, 0  # the warpgroups of a program


class Plan(NamedTuple):
    """Everything about a call that is known while tracing."""

    batch: int
    heads: int  # K
    rotations: int  # A
    rows: int  # X
    width: int  # H
    slots: int  # S
    page: int  # slots; a dense cache is one page per row
    block: int  # Y
    stages: int
    at_once: int  # programs that the chip runs at the same time
    segments: int  # Z, the number of programs
    paged: bool
    int8: bool
    lse: bool = False  # whether it is asked for

    @property
    def pieces(self) -> int:
        """Pages that make up a block: more than one where pages are shorter."""
        return max(1, self.block // self.page) if self.paged else 1

    @property
    def copies(self) -> int:
        """Copies that fill a stage."""
        return self.pieces * (4 if self.int8 else 2)

    @property
    def reduction(self) -> int:
        """Bytes for the maximum across warps in one go: each of 128 threads has X / 4 columns of a float32 tile."""
        return 128 * self.rows

    def scratch(self) -> dict[str, Any]:
        """Shared memory of a program: name -> (shape, dtype)."""
        A, X, Y, H = self.rotations, self.rows, self.block, self.width
        cache = jnp.int8 if self.int8 else jnp.bfloat16
        arrays = {
            "q": ((A, X, H), jnp.bfloat16),
            "spans": ((A, 2, X), jnp.int32),
            "k": ((self.stages, Y, H), cache),
            "v": ((self.stages, Y, H), cache),
            "p": ((X, Y), jnp.bfloat16),
        }
        if self.int8:
            arrays |= {"k_scale": ((self.stages, Y), jnp.float32), "v_scale": ((self.stages, Y), jnp.float32)}
            arrays |= {"k_wide": ((Y, H), jnp.bfloat16), "v_wide": ((Y, H), jnp.bfloat16)}
        return arrays


def decode_attention(rotations, cache: Cache, masks: Masks, *, return_lse, block_k=None, stages=None):
    """Returns (out [B, T, N, H] in q's dtype, lse or None). block_k and stages are taken from blocks.py where None."""
    on = require("gpu", ("hopper",))
    plan = make_plan(rotations[0], cache, on, len(rotations), block_k, stages)._replace(lse=return_lse)
    if not hasattr(plgpu, "store"):
        raise NotImplementedError("needs jax 0.12, whose Mosaic GPU stores any layout of registers to GMEM")
    return _attend(plan, on.interpret, rotations, cache, spans_of(masks, plan.slots, cache.first), masks.scale_B)


def make_plan(q, cache: Cache, on, rotations=1, block_k=None, stages=None) -> Plan:
    """The plan of a call; raises NotImplementedError where the kernel cannot take the shapes or dtypes."""
    k = cache.k
    (B, T, N, H), (_, K, page, _) = q.shape, k.shape
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    if q.dtype != jnp.bfloat16 or k.dtype not in (jnp.bfloat16, jnp.int8):
        raise NotImplementedError(f"needs bfloat16 queries and a bfloat16 or int8 cache, got {q.dtype} and {k.dtype}")
    rows, int8, paged = T * (N // K), k.dtype == jnp.int8, cache.block_table_BP is not None
    if rows > ROWS:
        raise NotImplementedError(f"needs at most {ROWS} query rows per kv head (T * N / K), got {rows}")
    sizes = block_sizes(BLOCKS, on, shape_class(H, int8))
    Y = block_k or sizes["block_k"]
    if not paged and page % 8:
        raise NotImplementedError(f"needs a cache length that is a multiple of 8, got {page}")
    shortest = 32 if int8 else 8  # the scales of a page must fill a line of 128 bytes of shared memory
    if paged and (page % shortest or (page % Y and Y % page)):
        raise NotImplementedError(f"needs pages of a multiple of {shortest} slots that fit evenly with {Y}, got {page}")
    plan = Plan(
        batch=B,
        heads=K,
        rotations=rotations,
        rows=-(-rows // 8) * 8,
        width=H,
        slots=cache.slots,
        page=page,
        block=Y,
        stages=stages or sizes["stages"],
        at_once=0,
        segments=0,
        paged=paged,
        int8=int8,
    )
    two = plan.rows <= FEW_ROWS and 2 * (shared_memory(plan) + RESERVED) <= SHARED_MEMORY
    at_once, heads = MULTIPROCESSORS * (2 if two else 1), B * K
    # Of each row and head the last segment may be short: there are up to B * K more of them than an even cut makes.
    rounds = 1 if heads <= FEW * at_once else ROUNDS + -(-heads // at_once)
    return plan._replace(at_once=at_once, segments=at_once * rounds)


def shape_class(H, int8) -> str:
    return f"head {H}, {'int8' if int8 else 'bfloat16'}"


def shared_memory(plan: Plan) -> int:
    """Bytes of shared memory of a program: the arrays, and what Pallas takes for reductions across warps."""
    return (
        sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in plan.scratch().values()) + plan.reduction
    )


# ---------------------------------------------------------------------- visible slots as intervals


def spans_of(masks: Masks, slots, origin=0):
    """int32 [B, A, 2, T]: the slots [first, end) that each query sees in each rotation; end <= first for none.

    Slot 0 holds the position `origin`.
    """
    pairs = [(jnp.maximum(first - origin, 0), jnp.clip(last + 1 - origin, 0, slots)) for first, last in masks.spans()]
    return jnp.stack([jnp.stack(pair, axis=1) for pair in pairs], axis=1).astype(jnp.int32)


def visits_of(spans_BA2T, block):
    """int32 [B, 2, A]: a row's visits are numbered through its rotations; [0] where the numbers of each rotation end,
    [1] what to add to a number to get the block of keys."""
    first_BAT, end_BAT = spans_BA2T[:, :, 0], spans_BA2T[:, :, 1]
    some_BAT = first_BAT < end_BAT
    first_BA = jnp.min(first_BAT // block, axis=-1, where=some_BAT, initial=2**30)
    last_BA = jnp.max((end_BAT - 1) // block, axis=-1, where=some_BAT, initial=-1)
    count_BA = jnp.maximum(last_BA - first_BA + 1, 0)
    ends_BA = jnp.cumsum(count_BA, axis=1)
    return jnp.stack([ends_BA, first_BA - (ends_BA - count_BA)], axis=1).astype(jnp.int32)


def segments_of(visits_B, plan: Plan):
    """(int32 [Z, 4]: row, kv head, first visit and number of visits of each segment, 0 where there is nothing to do;
    int32 [B, 2]: first segment of a row's first head, and how many segments each of its heads has)."""
    B, heads, segments = plan.batch, plan.heads, plan.segments
    total = heads * jnp.sum(visits_B)
    share = jnp.maximum(-(-total // (segments - B * heads)), jnp.clip(-(-total // plan.at_once), 1, LONG))
    parts_B = -(-visits_B // share)
    ends_B = jnp.cumsum(heads * parts_B)
    starts_B = ends_B - heads * parts_B
    number_Z = jnp.arange(segments)
    b_Z = jnp.minimum(jnp.sum(number_Z[:, None] >= ends_B, axis=1), B - 1)
    parts_Z, visits_Z = jnp.maximum(parts_B, 1)[b_Z], visits_B[b_Z]
    head_Z, part_Z = jnp.divmod(number_Z - starts_B[b_Z], parts_Z)
    first_Z = part_Z * visits_Z // parts_Z
    count_Z = jnp.where(number_Z < ends_B[-1], (part_Z + 1) * visits_Z // parts_Z - first_Z, 0)
    segments_Z4 = jnp.stack([b_Z, head_Z, first_Z, count_Z], axis=1)
    return segments_Z4.astype(jnp.int32), jnp.stack([starts_B, parts_B], axis=1).astype(jnp.int32)


# ---------------------------------------------------------------------- the kernels


class Inputs(NamedTuple):
    """In GMEM. The leading dimensions are folded, because a copy has at most five and tiling takes two of them."""

    q: Any  # [B * K * A, X, H]
    spans: Any  # int32 [B, A, 2, X]
    visits: Any  # int32 [B, 2, A]
    segments: Any  # int32 [Z, 4]
    scale: Any  # float32 [B]: the softmax scale times log2(e)
    k: Any  # [pages * K, page, H]; dense [B * K, S, H]
    v: Any
    table: Any  # int32 [B, P], or None
    k_scale: Any  # float32 [pages * K, page], or None
    v_scale: Any


def _kernel(plan: Plan, gm: Inputs, acc_gm, stats_gm, *, ready, filled, drained, q, spans, k, v, p, **int8):
    """Walks segment z. acc_gm: float32 [Z, H, X], sums of p v; stats_gm: float32 [Z, 2, X], maxima and sums of p."""
    K, A, X, Y, H, stages = plan.heads, plan.rotations, plan.rows, plan.block, plan.width, plan.stages
    z = lax.axis_index("segment")
    b, head, first, count = (gm.segments[z, i] for i in range(4))
    ends = [gm.visits[b, 0, a] for a in range(A)]
    shifts = [gm.visits[b, 1, a] for a in range(A)]

    def place(turn):
        """(rotation, block of keys) of a visit of this segment."""
        number, rotation, shift = first + turn, jnp.int32(0), shifts[0]
        for a in range(1, A):
            rotation = jnp.where(number >= ends[a - 1], a, rotation)
            shift = jnp.where(number >= ends[a - 1], shifts[a], shift)
        return rotation, number + shift

    def where_is(j, piece):
        """(row of gm.k, first slot in it) of a piece of block j."""
        if not plan.paged:
            return b * K + head, j * Y
        if plan.page < Y:
            return gm.table[b, j * plan.pieces + piece] * K + head, 0
        blocks = plan.page // Y
        return gm.table[b, lax.div(j, blocks)] * K + head, lax.rem(j, blocks) * Y

    @pl.when(lax.axis_index("warpgroup") == COPIER)
    def _copy():
        @pl.loop(0, count)
        def _(turn):
            stage = lax.rem(turn, stages)

            @pl.when(turn >= stages)
            def _():
                plgpu.barrier_wait(drained.at[stage])

            _, j = place(turn)
            size = Y // plan.pieces
            for piece in range(plan.pieces):
                row, slot = where_is(j, piece)
                source, target = (row, pl.ds(slot, size)), (stage, pl.ds(piece * size, size))
                plgpu.copy_gmem_to_smem(gm.k.at[source], k.at[target], filled.at[stage])
                plgpu.copy_gmem_to_smem(gm.v.at[source], v.at[target], filled.at[stage])
                if plan.int8:
                    plgpu.copy_gmem_to_smem(gm.k_scale.at[source], int8["k_scale"].at[target], filled.at[stage])
                    plgpu.copy_gmem_to_smem(gm.v_scale.at[source], int8["v_scale"].at[target], filled.at[stage])

    @pl.when((lax.axis_index("warpgroup") == READER) & (count > 0))
    def _read():
        for a in range(A):
            plgpu.copy_gmem_to_smem(gm.q.at[(b * K + head) * A + a], q.at[a], ready)
        plgpu.copy_gmem_to_smem(gm.spans.at[b], spans, ready)
        scale = gm.scale[b]
        plgpu.barrier_wait(ready)

        def along_X(x, rows):
            return lax.broadcast_in_dim(x, (rows, X), [1])

        def along_Y(x):
            return lax.broadcast_in_dim(x, (Y, X), [0])

        def widened(x):  # in a layout whose loads of int8 and stores of bfloat16 are both wide
            return plgpu.layout_cast(x, plgpu.Layout.WGMMA_UPCAST_4X).astype(jnp.bfloat16)

        def visit(turn, carry):
            top_X, total_WX, acc_HX = carry
            stage = lax.rem(turn, stages)
            rotation, j = place(turn)
            plgpu.barrier_wait(filled.at[stage])
            k_YH, v_YH = k.at[stage], v.at[stage]
            if plan.int8:
                k_YH, v_YH = int8["k_wide"], int8["v_wide"]
                k_YH[...] = widened(k[stage])
                plgpu.commit_smem()

            def score(s_ref):
                plgpu.wgmma(s_ref, k_YH, q.at[rotation].T)
                if plan.int8:  # while the tensor cores work
                    v_YH[...] = widened(v[stage])
                return s_ref[...]

            s_YX = pl.run_scoped(score, plgpu.ACC((Y, X), jnp.float32)) * scale
            if plan.int8:
                s_YX *= along_Y(int8["k_scale"][stage])
            slot_YX = j * Y + plgpu.broadcasted_iota(jnp.int32, (Y, X), 0, layout=plgpu.Layout.WGMMA)
            seen_YX = (slot_YX >= along_X(spans[rotation, 0], Y)) & (slot_YX < along_X(spans[rotation, 1], Y))
            s_YX = jnp.where(seen_YX, s_YX, -jnp.inf)

            new_top_X = jnp.maximum(top_X, jnp.max(s_YX, axis=0))
            shrink_X = jnp.exp2(top_X - new_top_X)
            p_YX = jnp.exp2(s_YX - along_X(new_top_X, Y))
            total_WX *= along_X(shrink_X, TILE)  # added up across threads once, at the end
            for y in range(0, Y, TILE):
                total_WX += p_YX[y : y + TILE]
            if plan.int8:
                p_YX *= along_Y(int8["v_scale"][stage])
            p.T[...] = p_YX.astype(jnp.bfloat16)
            plgpu.commit_smem()

            def weigh(o_ref):
                plgpu.wgmma(o_ref, v_YH.T, p.T)
                return o_ref[...]

            o_HX = pl.run_scoped(weigh, plgpu.ACC((H, X), jnp.float32))

            @pl.when(turn + stages < count)
            def _():
                plgpu.barrier_arrive(drained.at[stage])

            return new_top_X, total_WX, acc_HX * along_X(shrink_X, H) + o_HX

        start = (
            plgpu.layout_cast(jnp.full((X,), LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(0)),
            plgpu.layout_cast(jnp.zeros((TILE, X), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.zeros((H, X), jnp.float32), plgpu.Layout.WGMMA),
        )
        top_X, total_WX, acc_HX = lax.fori_loop(0, count, visit, start)
        # From registers to GMEM as they lie: a few KB per program, and rows of X numbers are whole 32-byte sectors.
        plgpu.store(acc_gm.at[z], acc_HX, optimized=False)
        plgpu.store(stats_gm.at[z, 0], top_X, optimized=False)
        plgpu.store(stats_gm.at[z, 1], jnp.sum(total_WX, axis=0), optimized=False)


def _merge(plan: Plan, parts_gm, acc_gm, stats_gm, out_gm, sums_gm=None):
    """Puts the segments of a row and head together, for 64 of the H. parts_gm: int32 [B, 2]; out_gm: [B, K, H, X].

    sums_gm: float32 [B, K, 2, X], the maximum and the sum that lse is made of, or None.
    """
    X, b, head = plan.rows, lax.axis_index("row"), lax.axis_index("head")
    tile = pl.ds(lax.axis_index("tile") * TILE, TILE)
    parts = parts_gm[b, 1]
    first = parts_gm[b, 0] + head * parts
    together = max(1, MERGED // X)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def along_X(x):
        return lax.broadcast_in_dim(x, (TILE, X), [1])

    def add(n, carry):
        top_X, total_X, acc_WX = carry
        for i in range(together):
            part = n * together + i
            z = first + jnp.minimum(part, parts - 1)
            missing = jnp.where(part < parts, 0, -jnp.inf)  # the last again, weighing nothing
            part_top_X = load(stats_gm.at[z, 0], plgpu.Layout.WGMMA.reduce(0)) + missing
            new_top_X = jnp.maximum(top_X, part_top_X)
            shrink_X, weight_X = jnp.exp2(top_X - new_top_X), jnp.exp2(part_top_X - new_top_X)
            total_X = total_X * shrink_X + load(stats_gm.at[z, 1], plgpu.Layout.WGMMA.reduce(0)) * weight_X
            part_WX = load(acc_gm.at[z, tile], plgpu.Layout.WGMMA)
            acc_WX = acc_WX * along_X(shrink_X) + part_WX * along_X(weight_X)
            top_X = new_top_X
        return top_X, total_X, acc_WX

    start = (
        plgpu.layout_cast(jnp.full((X,), LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(0)),
        plgpu.layout_cast(jnp.zeros((X,), jnp.float32), plgpu.Layout.WGMMA.reduce(0)),
        plgpu.layout_cast(jnp.zeros((TILE, X), jnp.float32), plgpu.Layout.WGMMA),
    )
    top_X, total_X, acc_WX = lax.fori_loop(0, lax.div(parts + together - 1, together), add, start)
    if sums_gm is not None:

        @pl.when(lax.axis_index("tile") == 0)
        def _():
            plgpu.store(sums_gm.at[b, head, 0], top_X, optimized=False)
            plgpu.store(sums_gm.at[b, head, 1], total_X, optimized=False)

    total_X = jnp.where(total_X > 0, total_X, 1)  # a query that sees nothing gets zeros
    plgpu.store(out_gm.at[b, head, tile], acc_WX / along_X(total_X), optimized=False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(plan: Plan, interpret, rotations, cache: Cache, spans_BA2T, scale_B):
    B, T, N, H = rotations[0].shape
    K, A, X, Z, G = plan.heads, plan.rotations, plan.rows, plan.segments, N // plan.heads

    def rows(x_BTNH):
        x_BKXH = x_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
        return jnp.pad(x_BKXH, ((0, 0), (0, 0), (0, X - T * G), (0, 0)))

    spans_BA2X = jnp.pad(jnp.repeat(spans_BA2T, G, axis=-1), ((0, 0), (0, 0), (0, 0), (0, X - T * G)))

    def fold(x):
        return None if x is None else x.reshape(-1, *x.shape[2:])

    table = None
    if plan.paged:  # the last block may lack some pages
        table = cache.pages_BP
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % plan.pieces)))
    visits_B2A = visits_of(spans_BA2T, plan.block)
    segments_Z4, parts_B2 = segments_of(visits_B2A[:, 0, -1], plan)
    inputs = Inputs(
        q=jnp.stack([rows(x) for x in rotations], axis=2).reshape(B * K * A, X, H),
        spans=spans_BA2X,
        visits=visits_B2A,
        segments=segments_Z4,
        scale=scale_B * math.log2(math.e),
        k=fold(cache.k),
        v=fold(cache.v),
        table=table,
        k_scale=fold(cache.k_scale),
        v_scale=fold(cache.v_scale),
    )

    def decode_attention_kernel(*refs, **scratch):
        _kernel(plan, *refs, **scratch)

    def merge_kernel(*refs):
        _merge(plan, *refs)

    partial_results = plgpu.kernel(
        decode_attention_kernel,
        out_type=(jax.ShapeDtypeStruct((Z, H, X), jnp.float32), jax.ShapeDtypeStruct((Z, 2, X), jnp.float32)),
        scratch_types={
            "ready": plgpu.Barrier(num_arrivals=A + 1),
            "filled": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=plan.stages),
            "drained": plgpu.Barrier(num_barriers=plan.stages),
            **{name: plgpu.SMEM(*array) for name, array in plan.scratch().items()},
        },
        grid=(Z,),
        grid_names=("segment",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=plan.reduction),
        interpret=interpret,
    )(inputs)
    sums = (jax.ShapeDtypeStruct((B, K, 2, X), jnp.float32),) if plan.lse else ()
    out_BKHX, *sums_BK2X = plgpu.kernel(
        merge_kernel,
        out_type=(jax.ShapeDtypeStruct((B, K, H, X), jnp.float32), *sums),
        grid=(H // TILE, K, B),
        grid_names=("tile", "head", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(parts_B2, *partial_results)
    out_BKHTG = out_BKHX[..., : T * G].reshape(B, K, H, T, G)
    out = out_BKHTG.transpose(0, 3, 1, 4, 2).reshape(B, T, N, H).astype(rotations[0].dtype)
    if not plan.lse:
        return out, None
    top_BKX, total_BKX = sums_BK2X[0][:, :, 0, : T * G], sums_BK2X[0][:, :, 1, : T * G]
    lse_BKX = jnp.where(total_BKX > 0, top_BKX * math.log(2) + jnp.log(total_BKX), -jnp.inf)  # the maxima are of base 2
    return out, lse_BKX.reshape(B, K, T, G).swapaxes(1, 2).reshape(B, T, N)


# ---------------------------------------------------------------------- what it costs


def count(
    B, T, S, N, K, H, *, on, dtype=jnp.bfloat16, cache_dtype=None, page=None, positions_BT=None, window=None,
    chunk_len=None, **overrides,
) -> Count:  # fmt: skip
    """Of a cache of S slots, paged if `page` is given. The queries are the last T of S positions, if not given."""
    q = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    k = jax.ShapeDtypeStruct((B * (S // page), K, page, H) if page else (B, K, S, H), cache_dtype or dtype)
    table = jax.ShapeDtypeStruct((B, S // page), jnp.int32) if page else None
    plan = make_plan(q, Cache(k, k, table), on, 1 if chunk_len is None else CHUNK_REGIONS, **overrides)
    masks = last_queries(B, T, S, window=window, chunk_len=chunk_len, positions_BT=positions_BT)
    visits_B = visits_of(spans_of(masks, plan.slots), plan.block)[:, 0, -1]
    segments = K * int(segments_of(visits_B, plan)[1][:, 1].sum())
    visits = K * int(visits_B.sum())
    slot_bytes = H * k.dtype.itemsize + (4 if plan.int8 else 0)
    return Count(
        flops=visits * 2 * (2 * plan.rows * plan.block * H),
        hbm_bytes=visits * 2 * plan.block * slot_bytes
        + segments * plan.rotations * plan.rows * (H * 2 + 2 * 4)  # queries and spans, by every segment
        + 2 * segments * plan.rows * (H + 2) * 4  # results, written and merged
        + B * K * plan.rows * H * 4
        + B * T * N * H * 2,
        fast_memory_bytes=shared_memory(plan),
    )
