# SPDX-License-Identifier: Apache-2.0
"""Gradients of flash and Dual Chunk Attention on Hopper GPUs, in Mosaic GPU: two kernels over visit lists.

Per pair of blocks, with P = exp(S - lse) recomputed from S = scale * Q K^T and delta = rowsum(dO * O) - dlse:

    dP = dO V^T    dS = P * (dP - delta)    dQ += scale * dS K    dK += scale * dS^T Q    dV += P^T dO

dQ wants to be summed along a row of blocks, dK and dV along a column. One kernel cannot do both without atomic
additions, whose order differs from run to run. So there are two kernels, each the only writer of what it sums:

(1) dq: a program keeps a block of queries (of one head) and visits blocks of keys; one sum per rotation of the query.
(2) dkdv: a program keeps a block of keys and visits blocks of queries of every head that shares them; it works on the
    transposed tables S^T and P^T, which leaves P^T and dS^T in registers as left operands of the next products.

This takes seven products per pair of blocks where five would do; in return results are the same to the bit every time.

Who does what: a program is a producer warpgroup and one or two consumers. The producer reads the list and copies the
blocks it names into a ring of stages (the copy engine works while the tensor cores do); a consumer owns 64 rows, waits
for a stage to be full, multiplies, and gives the stage back. What a query may see is brought beforehand to an interval
of key positions per rotation (`spans`), so a mask is two comparisons, and a pair marked whole needs none.

B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head width, A rotations (1, or 3 with chunks),
I blocks of queries, J blocks of keys, X rows of a tile, Y its columns, U integers per query: its span
and segment.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..masks import Masks, last_queries
from ..visibility import CHUNK_REGIONS
from ..visits import unpack, visits_of
from .blocks import BLOCKS
from .gpu_tiles import (
    COLUMN,
    COMPILER,
    LOG2E,
    ROW,
    ROWS,
    TILED,
    Count,
    along,
    key_numbers,
    left_operand,
    load,
    pad,
    query_spans,
    scratch_bytes,
    seen,
)

REGISTERS = {2: (240, 24)}  # consumers: (of a consumer, of the producer), of the 64K that the threads share


class Sizes(NamedTuple):
    """Tile shapes of one kernel: `block` tokens stay, `step` tokens per visit, `stages` of the ring."""

    block: int
    step: int
    stages: int

    @property
    def consumers(self) -> int:
        return self.block // ROWS


# ---------------------------------------------------------------------- operands of both kernels


class Inputs(NamedTuple):
    """Operands of both kernels: in device memory, lengths multiples of 8 (arrays of numbers: of the block sizes)."""

    rotations: tuple  # A x [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any
    dout: Any  # [B, T, N, H]
    row_stats: Any  # float32 [B, N, 2, T]: lse in units of log 2, +inf where it was -inf; delta
    spans: Any  # int32 [B, A, U, T]: first and last key position that a query sees with this rotation; its segment
    keys: Any  # int32 [B, U - 1, S]: position, FAR for padding; segment
    scale_B: Any  # float32 [B]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


# ---------------------------------------------------------------------- (1) the gradient of the query


def _dq(inputs: Inputs, masks: Masks, sizes: Sizes, interpret):
    A, (B, T, N, H), K = len(inputs.rotations), inputs.rotations[0].shape, inputs.k.shape[2]
    X, Y, stages, consumers = ROWS, sizes.step, sizes.stages, sizes.consumers
    visits = _visits(masks, sizes, "query")
    I, J = pl.cdiv(T, sizes.block), pl.cdiv(inputs.k.shape[1], Y)

    def dq_kernel(words, starts, inputs, *refs):
        dq, (q_tile, dout_tile, k_ring, v_ring, spare, q_full, dout_full, ring_full, ring_empty) = refs[:A], refs[A:]
        i = I - 1 - lax.axis_index("i")  # the longest rows of a causal mask first: short ones fill the gaps at the end
        b, head = lax.axis_index("b"), lax.axis_index("head")
        row, warpgroup = (b * I + i) * A, lax.axis_index("warpgroup")
        first, last = starts[row], starts[row + A]  # the program's entries, rotation after rotation

        @pl.when(warpgroup == consumers)
        def producer():
            if consumers in REGISTERS:
                plgpu.set_max_registers(REGISTERS[consumers][1], action="decrease")

            @pl.loop(first, last)
            def fill(n):
                slot = lax.rem(n - first, stages)
                pl.when(n - first >= stages)(lambda: plgpu.barrier_wait(ring_empty.at[slot]))
                _, j, _, _ = unpack(words[n], J)
                at, full = pl.ds(j * Y, Y), ring_full.at[slot]
                plgpu.copy_gmem_to_smem(inputs.k.at[b, at, lax.div(head, N // K)], k_ring.at[slot], full)
                plgpu.copy_gmem_to_smem(inputs.v.at[b, at, lax.div(head, N // K)], v_ring.at[slot], full)

        @pl.when(warpgroup < consumers)
        def consumer():
            if consumers in REGISTERS:
                plgpu.set_max_registers(REGISTERS[consumers][0], action="increase")
            mine = pl.ds(i * sizes.block + warpgroup * X, X)
            q_, q_full_ = q_tile.at[warpgroup], q_full.at[warpgroup]
            dout_, dout_full_ = dout_tile.at[warpgroup], dout_full.at[warpgroup]
            plgpu.copy_gmem_to_smem(inputs.dout.at[b, mine, head], dout_, dout_full_)
            lse_X, delta_X = load(inputs.row_stats.at[b, head, :, mine], ROW)
            scale = inputs.scale_B[b]
            plgpu.barrier_wait(dout_full_)

            @pl.loop(0, A)
            def region(a):
                begin, end = starts[row + a], starts[row + a + 1]

                @pl.when(begin < end)
                def load_query():
                    for r, rotation in enumerate(inputs.rotations):
                        copy = functools.partial(plgpu.copy_gmem_to_smem, rotation.at[b, mine, head], q_, q_full_)
                        pl.when(a == r)(copy)
                    plgpu.barrier_wait(q_full_)

                def visit(n, dq_acc):
                    slot = lax.rem(n - first, stages)
                    _, j, _, whole = unpack(words[n], J)

                    def tile(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, q_, k_ring.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_acc, dout_, v_ring.at[slot].transpose((1, 0)))

                        def masked(s_XY):
                            query = load(inputs.spans.at[b, a, :, mine], ROW)
                            key = load(inputs.keys.at[b, :, pl.ds(j * Y, Y)], COLUMN)
                            return jnp.where(seen(query, key, (X, Y), 0), s_XY, -jnp.inf)

                        s_XY = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # dp is still being computed
                        s_XY = s_XY * (scale * LOG2E) - along(lse_X, 0, (X, Y))
                        p_XY = jnp.exp2(lax.cond(whole == 1, lambda s_XY: s_XY, masked, s_XY))
                        ds_XY = p_XY * (dp_acc[...] - along(delta_X, 0, (X, Y)))
                        plgpu.wgmma(dq_acc, left_operand(ds_XY, spare and spare.at[warpgroup]), k_ring.at[slot])
                        plgpu.wgmma_wait(0)

                    plgpu.barrier_wait(ring_full.at[slot])
                    pl.run_scoped(tile, plgpu.ACC((X, Y)), plgpu.ACC((X, Y)))
                    plgpu.barrier_arrive(ring_empty.at[slot])

                def walk(dq_acc):
                    pl.loop(begin, end)(functools.partial(visit, dq_acc=dq_acc))
                    return dq_acc[...]

                dq_XH = pl.run_scoped(walk, plgpu.ACC((X, H)))
                q_[...] = (dq_XH * scale).astype(jnp.bfloat16)
                plgpu.commit_smem()
                for r in range(A):
                    pl.when(a == r)(functools.partial(plgpu.copy_smem_to_gmem, q_, dq[r].at[b, mine, head]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        dq_kernel,
        out_type=[jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)] * A,
        scratch_types=_dq_scratch(sizes, H, interpret),
        grid=(I, B, N),
        grid_names=("i", "b", "head"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(visits.words_Z, visits.starts, inputs)


def _dq_scratch(sizes: Sizes, H: int, interpret):
    """What a program has in shared memory."""
    X, Y, stages, consumers = ROWS, sizes.step, sizes.stages, sizes.consumers
    return [
        _tiles(consumers, X, H),  # q, and later its gradient
        _tiles(consumers, X, H),  # dout
        _tiles(stages, Y, H),  # k
        _tiles(stages, Y, H),  # v
        _tiles(consumers, X, Y) if interpret else None,
        plgpu.Barrier(num_barriers=consumers),  # q has arrived
        plgpu.Barrier(num_barriers=consumers),  # dout has arrived
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # k and v have arrived
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),  # all have read them
    ]


# ---------------------------------------------------------------------- (2) the gradients of keys and values


def _dkdv(inputs: Inputs, masks: Masks, sizes: Sizes, interpret):
    A, N, (B, S, K, H) = len(inputs.rotations), inputs.dout.shape[2], inputs.k.shape
    X, Y, stages, consumers, G = ROWS, sizes.step, sizes.stages, sizes.consumers, N // K
    visits = _visits(masks, sizes, "key")
    I, J = pl.cdiv(inputs.dout.shape[1], Y), pl.cdiv(S, sizes.block)

    def dkdv_kernel(words, starts, inputs, dk, dv, dscale, *refs):
        k_tile, v_tile, dscale_tile, q_ring, dout_ring, stats_ring, spare, kv_full, ring_full, ring_empty = refs
        j, b, kv_head = lax.axis_index("j"), lax.axis_index("b"), lax.axis_index("kv_head")
        row, warpgroup = (b * J + j) * A, lax.axis_index("warpgroup")
        first, last = starts[row], starts[row + A]
        count = (last - first) * G  # every head of the group visits every entry

        def entry(n):
            """The n-th entry from the end: programs next to each other start together at the last queries and find
            them in L2. The first queries that they meet differ, with a causal mask."""
            return unpack(words[last - 1 - lax.div(n, G)], I)

        @pl.when(warpgroup == consumers)
        def producer():
            if consumers in REGISTERS:
                plgpu.set_max_registers(REGISTERS[consumers][1], action="decrease")

            @pl.loop(0, count)
            def fill(n):
                slot = lax.rem(n, stages)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(ring_empty.at[slot]))
                _, i, region, _ = entry(n)
                at, head, full = pl.ds(i * Y, Y), kv_head * G + lax.rem(n, G), ring_full.at[slot]
                for a in range(A):

                    @pl.when(region == a)
                    def copy_query(a=a):
                        plgpu.copy_gmem_to_smem(inputs.rotations[a].at[b, at, head], q_ring.at[slot], full)

                plgpu.copy_gmem_to_smem(inputs.dout.at[b, at, head], dout_ring.at[slot], full)
                plgpu.copy_gmem_to_smem(inputs.row_stats.at[b, head, :, at], stats_ring.at[slot], full)

        @pl.when(warpgroup < consumers)
        def consumer():
            if consumers in REGISTERS:
                plgpu.set_max_registers(REGISTERS[consumers][0], action="increase")
            mine = pl.ds(j * sizes.block + warpgroup * X, X)
            k_, v_, kv_full_ = k_tile.at[warpgroup], v_tile.at[warpgroup], kv_full.at[warpgroup]
            plgpu.copy_gmem_to_smem(inputs.k.at[b, mine, kv_head], k_, kv_full_)
            plgpu.copy_gmem_to_smem(inputs.v.at[b, mine, kv_head], v_, kv_full_)
            plgpu.barrier_wait(kv_full_)
            scale = inputs.scale_B[b]

            def visit(n, dk_acc, dv_acc):
                slot = lax.rem(n, stages)
                _, i, region, whole = entry(n)

                def tile(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, k_, q_ring.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, v_, dout_ring.at[slot].transpose((1, 0)))

                    def masked(s_XY):
                        query = load(inputs.spans.at[b, region, :, pl.ds(i * Y, Y)], COLUMN)
                        key = load(inputs.keys.at[b, :, mine], ROW)
                        return jnp.where(seen(query, key, (X, Y), 1), s_XY, -jnp.inf)

                    s_XY = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # dp is still being computed
                    lse_Y = plgpu.load(stats_ring.at[slot, 0], layout=COLUMN)
                    s_XY = s_XY * (scale * LOG2E) - along(lse_Y, 1, (X, Y))
                    p_XY = jnp.exp2(lax.cond(whole == 1, lambda s_XY: s_XY, masked, s_XY))
                    plgpu.wgmma(dv_acc, left_operand(p_XY, spare and spare.at[warpgroup, 0]), dout_ring.at[slot])
                    dp_XY = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)  # and now dv
                    delta_Y = plgpu.load(stats_ring.at[slot, 1], layout=COLUMN)
                    ds_XY = p_XY * (dp_XY - along(delta_Y, 1, (X, Y)))
                    plgpu.wgmma(dk_acc, left_operand(ds_XY, spare and spare.at[warpgroup, 1]), q_ring.at[slot])
                    plgpu.wgmma_wait(0)

                plgpu.barrier_wait(ring_full.at[slot])
                pl.run_scoped(tile, plgpu.ACC((X, Y)), plgpu.ACC((X, Y)))
                plgpu.barrier_arrive(ring_empty.at[slot])

            def walk(dk_acc, dv_acc):
                pl.loop(0, count)(functools.partial(visit, dk_acc=dk_acc, dv_acc=dv_acc))
                return dk_acc[...], dv_acc[...]

            dk_XH, dv_XH = pl.run_scoped(walk, plgpu.ACC((X, H)), plgpu.ACC((X, H)))
            # The logits are linear in the keys and in the scale alike, so the scale's gradient is dk * k / scale.
            k_XH = plgpu.load(k_, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            dscale_tile[warpgroup] = jnp.sum(dk_XH * k_XH, axis=1)
            k_[...] = (dk_XH * scale).astype(jnp.bfloat16)
            v_[...] = dv_XH.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dscale_tile.at[warpgroup], dscale.at[b, kv_head, mine])
            plgpu.copy_smem_to_gmem(k_, dk.at[b, mine, kv_head])
            plgpu.copy_smem_to_gmem(v_, dv.at[b, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

    kv_type = jax.ShapeDtypeStruct((B, S, K, H), jnp.bfloat16)
    dk, dv, dscale_BKS = plgpu.kernel(
        dkdv_kernel,
        out_type=[kv_type, kv_type, jax.ShapeDtypeStruct((B, K, J * sizes.block), jnp.float32)],
        scratch_types=_dkdv_scratch(sizes, H, interpret),
        grid=(J, B, K),
        grid_names=("j", "b", "kv_head"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(visits.words_Z, visits.starts, inputs)
    return dk, dv, jnp.sum(dscale_BKS, axis=(1, 2))


def _dkdv_scratch(sizes: Sizes, H: int, interpret):
    """What a program has in shared memory."""
    X, Y, stages, consumers = ROWS, sizes.step, sizes.stages, sizes.consumers
    return [
        _tiles(consumers, X, H),  # k, and later its gradient
        _tiles(consumers, X, H),  # v, and later its gradient
        plgpu.SMEM((consumers, X), jnp.float32),  # the scale's gradient, key by key
        _tiles(stages, Y, H),  # q
        _tiles(stages, Y, H),  # dout
        plgpu.SMEM((stages, 2, Y), jnp.float32),  # lse, delta
        _tiles(consumers, 2, X, Y) if interpret else None,
        plgpu.Barrier(num_arrivals=2, num_barriers=consumers),  # k and v have arrived
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),  # q, dout and its numbers have arrived
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),  # all have read them
    ]


def _tiles(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


def _visits(masks: Masks, sizes: Sizes, by: str):
    """The visit list of one kernel. A block without visible pairs has no entry; its program writes zeros anyway."""
    block_q, block_k = (sizes.block, sizes.step) if by == "query" else (sizes.step, sizes.block)
    return visits_of(masks, block_q, block_k, by=by, cover=False)


# ---------------------------------------------------------------------- the entry point


def backward(
    rotations, k, v, masks: Masks, out, lse_BTN, dout, dlse_BTN, *, block_q=None, block_k=None, interpret=False
):
    """Gradients of blockwise.attend: (dq, a tuple of A arrays, dk, dv, dscale float32 [B]), the arrays as their inputs.

    Args:
        out, lse_BTN: the results of the forward pass. dout, dlse_BTN: the cotangents of both.
        block_q, block_k: tokens per tile of both kernels, multiples of 64; None for those of blocks.py.
        interpret: InterpretGPUParams to run in Pallas's interpreter, False to compile.

    Raises:
        NotImplementedError: not bfloat16, or a head width other than 64 and 128.
    """
    (_, T, _, H), S = rotations[0].shape, k.shape[1]
    dq_sizes, dkdv_sizes = _sizes(H, block_q, block_k)
    for name, x in [*[("q", q) for q in rotations], ("k", k), ("v", v), ("dout", dout)]:
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"needs bfloat16, {name} is {x.dtype}")
    T_filled = _up(T, math.lcm(dq_sizes.block, dkdv_sizes.step))
    S_filled = _up(S, math.lcm(dq_sizes.step, dkdv_sizes.block))

    # d logit = p * (dp - delta); a cotangent of lse adds p * dlse, so it is only another part of delta.
    empty_BTN = lse_BTN == -jnp.inf  # with +inf there, exp(s - lse) is 0 whatever s is
    delta_BTN = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse_BTN
    rows = [(jnp.where(empty_BTN, jnp.inf, lse_BTN * LOG2E), jnp.inf), (jnp.where(empty_BTN, 0, delta_BTN), 0)]
    missing = ((0, 0), (0, 0), (0, T_filled - T))
    stats_BNT = [jnp.pad(x_BTN.swapaxes(1, 2), missing, constant_values=fill) for x_BTN, fill in rows]
    inputs = Inputs(
        tuple(pad(q, 8) for q in rotations),
        pad(k, 8),
        pad(v, 8),
        pad(dout, 8),
        jnp.stack(stats_BNT, axis=2),
        query_spans(masks, T_filled),
        key_numbers(masks.kv, S_filled),
        masks.scale_B,
    )
    dq = _dq(inputs, masks, dq_sizes, interpret)
    dk, dv, dscale_B = _dkdv(inputs, masks, dkdv_sizes, interpret)
    return tuple(x[:, :T] for x in dq), dk[:, :S], dv[:, :S], dscale_B


def _sizes(H: int, block_q=None, block_k=None) -> tuple[Sizes, Sizes]:
    """(sizes of dq, sizes of dkdv)."""
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    row = BLOCKS["hopper", f"gpu {H}"]
    return (
        Sizes(block_q or row["dq_q"], block_k or row["dq_k"], row["dq_stages"]),
        Sizes(block_k or row["dkv_k"], block_q or row["dkv_q"], row["dkv_stages"]),
    )


# ---------------------------------------------------------------------- what it costs


def count_backward(B, T, S, N, K, H, *, chunk_len=None, window=None, positions_BT=None, **overrides) -> Count:
    """Of the gradients of one call of flash_attention, or dual_chunk_attention if chunk_len is given.

    The keys are at positions 0..S-1 and the queries are the last T of them, unless `positions_BT` says otherwise.
    """
    masks = last_queries(B, T, S, window=window, chunk_len=chunk_len, positions_BT=positions_BT)
    both = _sizes(H, **overrides)
    visits, used = [], []
    for sizes, by in zip(both, ("query", "key"), strict=True):
        count_visits = jax.jit(functools.partial(_starts, sizes=sizes, by=by))
        starts = np.asarray(count_visits(masks), np.int64)
        visits.append(int(starts[-1]))
        used.append(int(np.sum(starts[1:] > starts[:-1])))  # pairs of a program (for one head) and a rotation it visits

    def tile(tokens):
        return 2 * tokens * H  # bytes

    dq, dkdv = both
    q_programs, kv_programs = B * pl.cdiv(T, dq.block), B * pl.cdiv(S, dkdv.block)
    rotations = 1 if chunk_len is None else CHUNK_REGIONS
    dq_own = N * (used[0] + q_programs + rotations * q_programs) * tile(dq.block)  # q, dout; gradients of q
    dq_visited = visits[0] * 2 * tile(dq.step)  # k, v
    dkdv_own = K * kv_programs * (4 * tile(dkdv.block) + 4 * dkdv.block)  # k, v and their gradients; the scale's
    dkdv_visited = N * visits[1] * (2 * tile(dkdv.step) + 8 * dkdv.step)  # q, dout; lse, delta
    pairs = [n * sizes.block * sizes.step for n, sizes in zip(visits, both, strict=True)]
    return Count(
        flops=2 * H * N * (3 * pairs[0] + 4 * pairs[1]),
        hbm_bytes=dq_own + K * dq_visited + dkdv_own + dkdv_visited,
        fast_memory_bytes=max(scratch_bytes(_dq_scratch(dq, H, False)), scratch_bytes(_dkdv_scratch(dkdv, H, False))),
        l2_bytes=dq_own + N * dq_visited + dkdv_own + dkdv_visited,
    )


def _starts(masks: Masks, sizes: Sizes, by: str):
    return _visits(masks, sizes, by).starts
