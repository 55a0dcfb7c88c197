# SPDX-License-Identifier: Apache-2.0
"""Decode attention on TPU: every key and value that is needed is copied from HBM once, in large, overlapping copies.

With a few queries per row there is little to do but read the cache, so the kernel is a reader with a softmax attached:

1. A row of the batch needs the slots from the start of its window to its last position. They are cut in *pieces*:
   pages, or equal parts of long pages (a dense row is one long page). Several pieces are a *block*. The blocks of all
   rows, one row after another, are the work. Nothing else is touched, however long the cache or its longest row is.
2. The work is cut in equal *parts*, one per core of the chip (v4 and v5p have two), wherever that falls: one long row
   occupies both cores. A part walks its blocks in order, and starts the copies of the next block, of whatever row,
   before it waits for those of the present one. So there are always one to two blocks on their way.
3. A block holds all heads of its slots. The query rows that share a head, T * N / K of them, are one product with its
   keys; then come a step of the running softmax and the product with the values.
4. Dual Chunk Attention has three rotations of the query in fast memory. A block inside one region takes its rotation.
   In a block with a chunk boundary all three score the same keys, and each slot chooses. Keys are still read once.
5. int8 is widened in fast memory. A scale belongs to a slot, so it multiplies the slot's logit or probability instead
   of the H numbers of its key or value.

Each part leaves a normalised result and, where there are two, its log-sum-exp for every row; XLA merges them.

Inside, positions are slots: the position of slot 0 is subtracted at the entry point, and only the chunks of Dual Chunk
Attention need it again.

A cache with H = 64 lies in memory as [.., H, S]: XLA keeps arrays so where H would fill only half of a row of 128
lanes, which costs twice the memory and bandwidth. The kernel takes that view of it, without a copy.

B batch, T queries per row, N query heads, K kv heads, G = N // K, H head width, A rotations, X query rows of a kv head
(T * G), S slots of a row, P pages of a row, Y slots of a block, C parts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blockwise import LOWEST
from ..counts import Count
from ..masks import Masks
from ..target import Target, block_sizes, require
from ..visibility import CHUNK_REGIONS, FAR, Bounds, block_regions, bounds
from .blocks import BLOCKS
from .cache import Cache

LANES = 128
MOST_ROWS = 128  # query rows of a key head; more are a prefill, and their logits would not fit
MOST_PAGES = 2**17  # entries of a block table: they are held in scalar memory, of which a core has 1 MiB


def decode_attention(rotations, cache: Cache, masks: Masks, *, return_lse, **overrides):
    """Returns (out [B, T, N, H] in q's dtype, lse or None). Overrides of blocks.py: `piece`, `pieces`, `parts`."""
    on = require("tpu")
    q, k = rotations[0], cache.k
    refuse(q, cache)
    (B, T, N, H), K, S = q.shape, k.shape[1], cache.slots
    G = N // K
    cut = choose_cut(block_sizes(BLOCKS, on, "tpu"), k, S, **overrides)
    q_BATKGH = jnp.stack(rotations, axis=1).reshape(B, -1, T, K, G, H)
    q_BAKXH = q_BATKGH.swapaxes(2, 3).reshape(B, len(rotations), K, T * G, H)
    at_BT = cache.slots_of(masks)
    numbers: dict[str, Any] = {
        "positions": at_BT,
        "pages": jnp.arange(B) if cache.block_table_BP is None else cache.pages_BP,
        "window": jnp.full(B, FAR) if masks.window_B is None else masks.window_B,
        "chunk_len": jnp.full(B, FAR) if masks.chunk_len_B is None else masks.chunk_len_B,
        "origin": cache.first,
    }
    numbers = {name: x.reshape(-1).astype(jnp.int32) for name, x in numbers.items()}
    out_CBKXH, lse_CBKX = _read_cache(
        plan(at_BT, masks.window_B, S, cut),
        numbers,
        masks.scale_B,
        q_BAKXH,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        G=G,
        cut=cut,
        return_lse=return_lse,
        interpret=on.interpret,
    )
    if cut.parts == 1:
        out_BKXH, lse_BKX = jax.tree.map(lambda x: x[0], (out_CBKXH, lse_CBKX))  # lse is None if not asked for
    else:
        out_BKXH, lse_BKX = merge(out_CBKXH, lse_CBKX)
    out = out_BKXH.reshape(B, K, T, G, H).swapaxes(1, 2).reshape(B, T, N, H).astype(q.dtype)
    return out, lse_BKX.reshape(B, K, T, G).swapaxes(1, 2).reshape(B, T, N) if return_lse else None


def refuse(q, cache: Cache):
    """Raises NotImplementedError where the kernel does not take the inputs."""
    (T, N, H), k, block_table_BP = q.shape[1:], cache.k, cache.block_table_BP
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs queries in bfloat16 or float32, got {q.dtype}")
    if k.dtype not in (q.dtype, jnp.int8):
        raise NotImplementedError(f"needs a cache in the dtype of the queries, {q.dtype}, or in int8, got {k.dtype}")
    G = N // k.shape[1]
    if T * G > MOST_ROWS:
        raise NotImplementedError(f"needs at most {MOST_ROWS} query rows per key head, got {T} queries of {G} heads")
    if block_table_BP is not None and block_table_BP.size > MOST_PAGES:
        raise NotImplementedError(f"needs a block table of at most {MOST_PAGES} entries, got {block_table_BP.size}")


def merge(out_CBKXH, lse_CBKX):
    """(out, lse): the parts' results by their shares of the sum of exponentials; 0 and -inf where none saw anything."""
    top_BKX = jnp.max(lse_CBKX, axis=0)
    top_BKX = jnp.where(top_BKX == -jnp.inf, 0, top_BKX)
    weight_CBKX = jnp.exp(lse_CBKX - top_BKX)
    total_BKX = jnp.sum(weight_CBKX, axis=0)
    share_CBKX = weight_CBKX / jnp.where(total_BKX > 0, total_BKX, 1)
    return jnp.sum(out_CBKXH * share_CBKX[..., None], axis=0), top_BKX + jnp.log(total_BKX)


# ---------------------------------------------------------------------- what is read


class Cut(NamedTuple):
    """How the cache is cut. All of it is static."""

    page: int  # slots of a page
    piece: int  # slots that one copy moves; divides `page`
    pieces: int  # of a block, at most
    parts: int  # of the work, which run at the same time
    slots_last: bool  # the cache lies in memory as [.., H, slots]


def choose_cut(sizes, k, S, piece=None, pieces=None, parts=None) -> Cut:
    """The largest pieces and blocks of a cache like k within the limits of a row of blocks.py; or those given."""
    K, page, H = k.shape[1:]
    slot_bytes, slots_last = K * H * k.dtype.itemsize, H < LANES
    if piece is None:
        # Copies move whole tiles. Slots are lanes of the scales and of a cache with slots last, otherwise sublanes.
        align = LANES if slots_last or k.dtype == jnp.int8 else 32 // k.dtype.itemsize
        if page % align:
            raise NotImplementedError(
                f"needs pages, or a dense cache, of a multiple of {align} slots for {k.dtype} and a head width of {H}, "
                f"got {page}"
            )
        tiles, most = page // align, max(1, sizes["piece_bytes"] // (slot_bytes * align))
        piece = align * max(n for n in range(1, min(tiles, most) + 1) if tiles % n == 0)
    if pieces is None:
        pieces = max(1, min(sizes["block_bytes"] // slot_bytes, sizes["block_slots"], S) // piece)
    return Cut(page, piece, pieces, parts or sizes["parts"], slots_last)


class Work(NamedTuple):
    """Row b needs the pieces first[b] .. end[b] - 1 of its slots; its blocks are starts[b] .. starts[b + 1] - 1."""

    starts: jax.Array  # int32 [B + 1]
    first: jax.Array  # int32 [B]
    end: jax.Array  # int32 [B]


def plan(q_positions_BT, window_B, S, cut: Cut) -> Work:
    at = bounds(q_positions_BT)
    low_B = jnp.zeros_like(at.low) if window_B is None else jnp.maximum(at.low - window_B + 1, 0)
    none_B = (at.high < 0) | (low_B >= S)  # before the cache begins, or with all of it behind the window
    first_B = jnp.minimum(low_B, S - 1) // cut.piece
    end_B = jnp.where(none_B, first_B, jnp.minimum(at.high, S - 1) // cut.piece + 1)
    blocks_B = -(-(end_B - first_B) // cut.pieces)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks_B, dtype=jnp.int32)])
    return Work(starts, first_B.astype(jnp.int32), end_B.astype(jnp.int32))


def count(
    B, T, S, N, K, H, *, on: Target, dtype=jnp.bfloat16, cache_dtype=None, page=None, positions_BT=None, window=None,
    chunk_len=None, **overrides,
) -> Count:  # fmt: skip
    """Of a cache of S slots, paged if `page` is given. The queries are the last T of S positions, if not given."""
    cache_dtype = jnp.dtype(cache_dtype or dtype)
    k = jax.ShapeDtypeStruct((B, K, page or S, H), cache_dtype)
    cut = choose_cut(block_sizes(BLOCKS, on, "tpu"), k, S, **overrides)
    at_BT = np.broadcast_to(np.arange(S - T, S), (B, T)) if positions_BT is None else np.asarray(positions_BT)
    work = jax.tree.map(np.asarray, plan(jnp.asarray(at_BT), None if window is None else jnp.full(B, window), S, cut))
    A, X, Y = 1 if chunk_len is None else CHUNK_REGIONS, T * (N // K), cut.pieces * cut.piece

    products = 2 * work.starts[-1]
    if chunk_len is not None:
        for b in range(B):
            slots0 = (work.first[b] + cut.pieces * np.arange(work.starts[b + 1] - work.starts[b])) * cut.piece
            low, high = _low_and_high(at_BT[b])
            nearest, furthest = _regions(low, high, slots0, Y, chunk_len, 0)
            products += (CHUNK_REGIONS - 1) * int(np.sum(nearest != furthest))
    slot_bytes = 2 * K * (H * cache_dtype.itemsize + (4 if cache_dtype == jnp.int8 else 0))
    out, lse, scratch = _shapes(B, A, K, X, H, dtype, cache_dtype, cut, return_lse=False)
    per_row = [jax.ShapeDtypeStruct((A, K, X, H), dtype)]
    per_row += [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in (out, lse) if x is not None]
    row_bytes = sum(map(_tiled_bytes, per_row))
    return Count(
        flops=int(products) * 2 * K * X * Y * H,
        hbm_bytes=int(np.sum(work.end - work.first)) * cut.piece * slot_bytes + cut.parts * B * row_bytes,
        fast_memory_bytes=sum(map(_tiled_bytes, scratch)) + 2 * row_bytes,  # of what comes and goes, Pallas keeps two
    )


def _tiled_bytes(x):
    """Bytes of an array in memory, where its last two dimensions fill whole tiles; 0 for what is not there."""
    if x is None or getattr(x, "memory_space", None) == pltpu.SEMAPHORE:
        return 0
    *outer, rows, lanes = x.shape
    itemsize = jnp.dtype(x.dtype).itemsize
    tile = 32 // itemsize
    return math.prod(outer) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * itemsize


# ---------------------------------------------------------------------- the kernel


def _shapes(B, A, K, X, H, dtype, cache_dtype, cut: Cut, return_lse):
    """(out, lse, scratch). With one part there is nothing to merge: lse if asked for, the result in its final dtype."""
    Y, one = cut.pieces * cut.piece, cut.parts == 1
    block = pltpu.VMEM((2, K, H, Y) if cut.slots_last else (2, K, Y, H), cache_dtype)
    scales = pltpu.VMEM((2, K, Y), jnp.float32) if cache_dtype == jnp.int8 else None
    number = pltpu.VMEM((K, X, 1), jnp.float32)
    return (
        jax.ShapeDtypeStruct((cut.parts, B, K, X, H), dtype if one else jnp.float32),
        None if one and not return_lse else jax.ShapeDtypeStruct((cut.parts, B, K, X), jnp.float32),
        [
            block,
            block,
            scales,
            scales,
            number,
            number,
            pltpu.VMEM((K, X, H), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )


@functools.partial(jax.jit, static_argnames=("G", "cut", "return_lse", "interpret"))
def _read_cache(work: Work, numbers, scale_B, q_BAKXH, k, v, k_scale, v_scale, *, G, cut: Cut, return_lse, interpret):
    """(out [C, B, K, X, H], lse [C, B, K, X]): what each part of the work found; lse is None where _shapes has none."""
    B, A, K, X, H = q_BAKXH.shape
    if cut.slots_last:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    out, lse, scratch = _shapes(B, A, K, X, H, q_BAKXH.dtype, k.dtype, cut, return_lse)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    scale_in_hbm = None if k_scale is None else in_hbm

    def of_row(x):
        return None if x is None else pl.BlockSpec((1, 1, *x.shape[2:]), lambda c, b, *_: (c, b, *(0,) * (x.ndim - 2)))

    return pl.pallas_call(
        functools.partial(_kernel, cut=cut, G=G),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=9,
            grid=(cut.parts, B),
            in_specs=[
                pl.BlockSpec((1, A, K, X, H), lambda c, b, *_: (b, 0, 0, 0, 0)),
                in_hbm,
                in_hbm,
                scale_in_hbm,
                scale_in_hbm,
            ],
            out_specs=(of_row(out), of_row(lse)),
            scratch_shapes=scratch,
        ),
        out_shape=(out, lse),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(
        *work,
        numbers["positions"],
        numbers["pages"],
        numbers["window"],
        numbers["chunk_len"],
        numbers["origin"],
        scale_B,
        q_BAKXH,
        k,
        v,
        k_scale,
        v_scale,
    )


def _kernel(
    # Numbers, in scalar memory.
    starts,
    first,
    end,
    positions,
    pages,
    window,
    chunk_len,
    origin,
    scale,
    # This row's queries in VMEM, and the whole cache where it lies.
    q_ref,
    k_hbm,
    v_hbm,
    k_scale_hbm,
    v_scale_hbm,
    # Results of this row.
    out_ref,
    lse_ref,
    # Two blocks of the cache, used in turn, and the running softmax.
    k_buf,
    v_buf,
    k_scale_buf,
    v_scale_buf,
    top_ref,
    total_ref,
    acc_ref,
    arrived,
    *,
    cut: Cut,
    G: int,
):
    """One grid step: this part's share of one row of the batch."""
    part, row = pl.program_id(0), pl.program_id(1)
    _, A, K, X, _ = q_ref.shape
    B, Y = first.shape[0], cut.pieces * cut.piece
    T, P = positions.shape[0] // B, pages.shape[0] // B
    begin, stop = (lax.div(starts[B] * n, cut.parts) for n in (part, part + 1))  # the blocks of this part

    # ------------------------------------------------------------------ moving blocks

    def row_of(block, row):
        """The row that owns a block, looked for from `row` on."""
        return lax.while_loop(lambda r: starts[r + 1] <= block, lambda r: r + 1, row)

    def pieces_of(block, row):
        """(number of the first piece within the row, how many)."""
        at = first[row] + (block - starts[row]) * cut.pieces
        return at, jnp.minimum(end[row] - at, cut.pieces)

    def slots(buf, i):
        """Piece i of a buffer, whose slots are in the dimension after its heads, or the last."""
        here = pl.ds(pl.multiple_of(i * cut.piece, cut.piece), cut.piece)
        return (slice(None), slice(None), here) if cut.slots_last and len(buf.shape) == 4 else (slice(None), here)

    def each_copy(block, row, act):
        turn, (at, count) = lax.rem(block, 2), pieces_of(block, row)
        pieces_per_page = cut.page // cut.piece

        def one(i, _):
            page = pages[row * P + lax.div(at + i, pieces_per_page)]
            within = lax.rem(at + i, pieces_per_page)
            for hbm, buf in ((k_hbm, k_buf), (v_hbm, v_buf), (k_scale_hbm, k_scale_buf), (v_scale_hbm, v_scale_buf)):
                if buf is not None:
                    source, target = hbm.at[page, *slots(buf, within)], buf.at[turn, *slots(buf, i)]
                    act(pltpu.make_async_copy(source, target, arrived.at[turn]))

        lax.fori_loop(0, count, one, None)

    start = functools.partial(each_copy, act=lambda copy: copy.start())
    wait = functools.partial(each_copy, act=lambda copy: copy.wait())

    def clear_rest(block, row):
        """Zeros for the values that a block which is not full lacks: their probability is 0, and 0 * nan is nan."""

        def one(i, _):
            for buf in (v_buf, v_scale_buf):
                if buf is not None:
                    piece = buf.at[lax.rem(block, 2), *slots(buf, i)]
                    piece[...] = jnp.zeros_like(piece)

        lax.fori_loop(pieces_of(block, row)[1], cut.pieces, one, None)

    @pl.when((row == 0) & (begin < stop))
    def first_block():
        start(begin, row_of(begin, 0))

    # ------------------------------------------------------------------ positions of the queries

    x_X1 = lax.broadcasted_iota(jnp.int32, (X, 1), 0)
    at_X1 = own_X1 = jnp.full((X, 1), -1, jnp.int32)  # the position, and where its chunk begins
    for t in range(T):
        position = positions[row * T + t]
        at_X1 = jnp.where(x_X1 >= t * G, position, at_X1)
        if A > 1:
            own_X1 = jnp.where(x_X1 >= t * G, position - lax.rem(position + origin[0], chunk_len[row]), own_X1)

    # ------------------------------------------------------------------ one block after another

    top_ref[...] = jnp.full_like(top_ref, LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(block, _):
        @pl.when(block + 1 < stop)
        def next_block():
            start(block + 1, row_of(block + 1, row))

        clear_rest(block, row)
        wait(block, row)
        turn = lax.rem(block, 2)
        slot0 = pieces_of(block, row)[0] * cut.piece
        slot_1Y = slot0 + lax.broadcasted_iota(jnp.int32, (1, Y), 1)
        seen_XY = (slot_1Y <= jnp.minimum(at_X1, P * cut.page - 1)) & (at_X1 - slot_1Y < window[row])

        def attend(score):
            for h in range(K):
                s_XY = score(h) * scale[row]
                if k_scale_buf is not None:
                    s_XY *= k_scale_buf[turn, pl.ds(h, 1)]
                s_XY = jnp.where(seen_XY, s_XY, -jnp.inf)
                top_X1 = jnp.maximum(top_ref[h], s_XY.max(-1, keepdims=True))
                p_XY = jnp.exp(s_XY - top_X1)
                shrink_X1 = jnp.exp(top_ref[h] - top_X1)
                top_ref[h] = top_X1
                total_ref[h] = total_ref[h] * shrink_X1 + p_XY.sum(-1, keepdims=True)
                if v_scale_buf is not None:
                    p_XY *= v_scale_buf[turn, pl.ds(h, 1)]
                v = v_buf[turn, h].astype(q_ref.dtype)
                acc_ref[h] = acc_ref[h] * shrink_X1 + _product(p_XY.astype(v.dtype), v, 1 if cut.slots_last else 0)

        def score(h, a):
            return _product(q_ref[0, a, h], k_buf[turn, h].astype(q_ref.dtype), 0 if cut.slots_last else 1)

        def by_slot(h):
            back_XY = own_X1 - slot_1Y  # how far before the chunk of the query: not, up to one chunk, or more
            older_XY = jnp.where(back_XY <= chunk_len[row], score(h, 1), score(h, 2))
            return jnp.where(back_XY <= 0, score(h, 0), older_XY)

        if A == 1:
            attend(lambda h: score(h, 0))
        else:
            low, high = _low_and_high([positions[row * T + t] for t in range(T)])
            nearest, furthest = _regions(low, high, slot0, Y, chunk_len[row], origin[0])
            pl.when(nearest == furthest)(lambda: attend(lambda h: score(h, nearest)))
            pl.when(nearest != furthest)(lambda: attend(by_slot))

    lax.fori_loop(jnp.maximum(begin, starts[row]), jnp.minimum(stop, starts[row + 1]), visit, None)

    total = total_ref[...]
    some = total > 0
    total = jnp.where(some, total, 1)
    out_ref[0, 0] = (acc_ref[...] / total).astype(out_ref.dtype)
    if lse_ref is not None:
        lse_KX1 = jnp.where(some, top_ref[...] + jnp.log(total), -jnp.inf)
        diagonal_XX = x_X1 == lax.broadcasted_iota(jnp.int32, (1, X), 1)
        for h in range(K):  # from a column to a row, so that it fills the lanes
            lse_ref[0, 0, pl.ds(h, 1)] = jnp.where(diagonal_XX, lse_KX1[h], 0).sum(axis=0, keepdims=True)


def _low_and_high(positions):
    """The range of the positions that are not padding."""
    low, high = FAR, -1
    for position in positions:
        low = jnp.where(position >= 0, jnp.minimum(low, position), low)
        high = jnp.maximum(high, position)
    return low, high


def _regions(low, high, slot0, Y, chunk_len, origin):
    """(nearest, furthest) region of the block from slot0 on for queries in low..high; slot 0 has position `origin`."""
    block = Bounds(slot0 + origin, jnp.minimum(slot0 + Y - 1, high) + origin, None, None)
    return block_regions(Bounds(low + origin, high + origin, None, None), block, chunk_len)


def _product(x, y, contract):
    """x [X, *] times y over dimension `contract` of y, in float32; float32 factors are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
