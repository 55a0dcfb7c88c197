# SPDX-License-Identifier: Apache-2.0
"""Flash and Dual Chunk Attention on Hopper GPUs, in Mosaic GPU: one kernel over a visit list, one softmax.

A program owns a block of queries of one head. The list (visits.py) names the blocks of keys that it visits, and which
rotation of the query scores each: ordinary attention has one rotation, Dual Chunk Attention three, for keys of the same
chunk, of the chunk before, and of all older ones. For every visit, with running maximum m, sum l and output O per row:

    S = Q K^T    m' = max(m, rowmax S)    P = 2^(S - m')    l = l * 2^(m - m') + rowsum P    O = O * 2^(m - m') + P V

and out = O / l at the end. Logits are kept in units of log 2: 2^x is what the hardware computes. So another rotation is
another tile of queries for some of the visits, and nothing else: no second pass, no merging of partial results.

Three warpgroups (of 128 threads) share the work, as in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608):

* The producer reads the list and has the copy engine (TMA) bring the blocks of K and V that it names into a ring of
  stages in shared memory. It only waits for free stages, and gives most of its registers to the consumers.
* Two consumers own 64 rows of queries each. They alternate at the tensor cores (ping-pong scheduling): while one
  multiplies (P V of this visit, Q K^T of the next), the other computes its softmax.
* A stage has two barriers: `full` when its copy has arrived, `empty` when both consumers have read it.

What a query may see is an interval of key positions per rotation (`spans`), so a mask is two comparisons; a visit that
the list calls whole needs none, and that is nearly all of them in a long sequence.

B batch, T queries, S keys, N query heads, K kv heads, G = N // K, H head width, A rotations (1 or 3), I blocks of
queries, J blocks of keys, X = 64 rows of a consumer's tile, Y = block_k its columns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..blockwise import LOWEST
from ..masks import Masks, cotangent, last_queries
from ..target import Target, block_sizes, require
from ..visibility import CHUNK_REGIONS
from ..visits import unpack, visits_of
from . import gpu_backward
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

CONSUMERS = 2
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40  # per thread; the three warpgroups together have 512
TINY = 1e-30  # stands for a scale of zero: -inf * TINY is -inf, where -inf * 0 is not a number


class Sizes(NamedTuple):
    block_q: int
    block_k: int
    stages: int  # of the ring


# ---------------------------------------------------------------------- the kernel


def _forward(sizes: Sizes, interpret, rotations, k, v, masks: Masks):
    """Returns (out [B, T, N, H], lse float32 [B, T, N])."""
    A, (B, T, N, H), (S, K) = len(rotations), rotations[0].shape, k.shape[1:3]
    X, Y, stages = ROWS, sizes.block_k, sizes.stages
    I, J = pl.cdiv(T, sizes.block_q), pl.cdiv(S, Y)
    visits = _visits(sizes, masks)
    rotations, k, v = jax.tree.map(lambda x: pad(x, 8), (rotations, k, v))  # a tile of the copy engine is 8 rows high
    spans_BAUT = query_spans(masks, I * sizes.block_q)
    keys_BUS = key_numbers(masks.kv, J * Y)

    def attention_kernel(words, starts, q_refs, k_ref, v_ref, spans_ref, keys_ref, scale_ref, out, lse, *scratch):
        q_tiles, k_ring, v_ring, lse_tile, spare, q_full, k_full, v_full, k_empty, v_empty, turn = scratch
        b, head, warpgroup = lax.axis_index("b"), lax.axis_index("head"), lax.axis_index("warpgroup")
        i = I - 1 - lax.axis_index("i")  # the longest rows of a causal mask first: short ones fill the gaps at the end
        row = (b * I + i) * A  # of starts
        begin, end = starts[row], starts[row + A]

        def slot_of(n):  # of the ring
            return lax.rem(n - begin, stages)

        @pl.when(warpgroup == CONSUMERS)
        def producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            @pl.loop(begin, end)
            def fill(n):
                slot, reused = slot_of(n), n - begin >= stages
                _, j, _, _ = unpack(words[n], J)
                at = (b, pl.ds(j * Y, Y), lax.div(head, N // K))
                pl.when(reused)(lambda: plgpu.barrier_wait(k_empty.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_ring.at[slot], k_full.at[slot])
                pl.when(reused)(lambda: plgpu.barrier_wait(v_empty.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_ring.at[slot], v_full.at[slot])

        @pl.when(warpgroup < CONSUMERS)
        def consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            mine = pl.ds(i * sizes.block_q + warpgroup * X, X)
            # The maximum of the logits is taken as |scale| * max(sign * q.k): the sign is left to the masked visits.
            scale = scale_ref[b] * LOG2E
            sign = jnp.where(scale < 0, -1.0, 1.0)
            magnitude = jnp.maximum(jnp.abs(scale), TINY)

            arrived = [q_full.at[a * CONSUMERS + warpgroup] for a in range(A)]
            used = [starts[row + a] < starts[row + a + 1] for a in range(A)]
            for a in range(A):
                from_, to = q_refs[a].at[b, mine, head], q_tiles.at[a, warpgroup]
                pl.when(used[a])(functools.partial(plgpu.copy_gmem_to_smem, from_, to, arrived[a]))
            for a in range(A):
                pl.when(used[a])(functools.partial(plgpu.barrier_wait, arrived[a]))

            def multiply_scores(s_acc, n, word):
                _, _, region, _ = unpack(word, J)
                plgpu.wgmma(s_acc, q_tiles.at[region, warpgroup], k_ring.at[slot_of(n)].transpose((1, 0)))

            def softmax(word, s_XY, top_X, total_X, acc_XH):
                _, j, region, whole = unpack(word, J)

                def masked(s_XY):
                    query = load(spans_ref.at[b, region, :, mine], ROW)
                    key = load(keys_ref.at[b, :, pl.ds(j * Y, Y)], COLUMN)
                    return jnp.where(seen(query, key, (X, Y), 0), s_XY * sign, -jnp.inf)

                s_XY = lax.cond((whole == 1) & (scale > 0), lambda s_XY: s_XY, masked, s_XY)
                new_top_X = jnp.maximum(top_X, s_XY.max(axis=1) * magnitude)
                shrink_X = jnp.exp2(top_X - new_top_X)
                p_XY = jnp.exp2(s_XY * magnitude - along(new_top_X, 0, (X, Y)))
                total_X = total_X * shrink_X + p_XY.sum(axis=1)
                return p_XY, new_top_X, total_X, acc_XH * along(shrink_X, 0, (X, H))

            def first_visit():
                def product(s_acc):
                    plgpu.barrier_wait(k_full.at[0])
                    plgpu.barrier_wait(turn.at[warpgroup])
                    multiply_scores(s_acc, begin, words[begin])
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])
                    return s_acc[...]

                s_XY = pl.run_scoped(product, plgpu.ACC((X, Y)))
                plgpu.barrier_arrive(k_empty.at[0])
                return words[begin], s_XY

            def visit(n, carry):
                """The softmax of visit n, then its P V and the Q K^T of visit n + 1 in one turn."""
                next_word = words[n + 1]  # loaded early, used late
                p_XY, top_X, total_X, acc_XH = softmax(*carry)
                slot, next_slot = slot_of(n), slot_of(n + 1)
                p_XY = left_operand(p_XY, spare and spare.at[warpgroup])

                def products(acc, s_acc):
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(k_full.at[next_slot])
                    plgpu.barrier_wait(turn.at[warpgroup])
                    plgpu.wgmma(acc, p_XY, v_ring.at[slot])
                    multiply_scores(s_acc, n + 1, next_word)
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])

                acc_XH, s_XY = _sums(products, acc_XH, jnp.zeros((X, Y), jnp.float32), interpret=interpret)
                plgpu.barrier_arrive(v_empty.at[slot])
                plgpu.barrier_arrive(k_empty.at[next_slot])
                return next_word, s_XY, top_X, total_X, acc_XH

            def last_visit(carry):
                p_XY, top_X, total_X, acc_XH = softmax(*carry)
                slot = slot_of(end - 1)
                p_XY = left_operand(p_XY, spare and spare.at[warpgroup])

                def product(acc):
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn.at[warpgroup])
                    plgpu.wgmma(acc, p_XY, v_ring.at[slot])
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])

                (acc_XH,) = _sums(product, acc_XH, interpret=interpret)
                plgpu.barrier_arrive(v_empty.at[slot])
                return top_X, total_X, acc_XH

            start = _full((X,), LOWEST, ROW), _full((X,), 0, ROW), _full((X, H), 0, plgpu.Layout.WGMMA)

            def walk(start):
                carry = lax.fori_loop(begin, end - 1, visit, (*first_visit(), *start))
                return last_visit(carry)

            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            top_X, total_X, acc_XH = lax.cond(begin < end, walk, lambda start: start, start)

            some_X = total_X > 0
            lse_tile[warpgroup] = jnp.where(some_X, top_X / LOG2E + jnp.log(total_X), -jnp.inf)
            out_tile = q_tiles.at[0, warpgroup]
            out_tile[...] = (acc_XH * along(jnp.where(some_X, 1 / total_X, 0), 0, (X, H))).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, out.at[b, mine, head])
            plgpu.copy_smem_to_gmem(lse_tile.at[warpgroup], lse.at[b, head, mine])
            plgpu.wait_smem_to_gmem(0)

    out, lse_BNT = plgpu.kernel(
        attention_kernel,
        out_type=[
            jax.ShapeDtypeStruct(rotations[0].shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((B, N, I * sizes.block_q), jnp.float32),  # tokens last: a copy wants 16 bytes in a row
        ],
        scratch_types=_scratch(sizes, A, H, interpret),
        grid=(B, I, N),  # the last changes fastest: heads that share keys run next to each other and find them in L2
        grid_names=("b", "i", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(visits.words_Z, visits.starts, rotations, k, v, spans_BAUT, keys_BUS, masks.scale_B)
    return out[:, :T], lse_BNT[:, :, :T].swapaxes(1, 2)


def _scratch(sizes: Sizes, A: int, H: int, interpret):
    """What a program has in shared memory."""
    X, Y, stages = ROWS, sizes.block_k, sizes.stages

    def tiles(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)

    return [
        tiles(A, CONSUMERS, X, H),  # the query in all rotations; at the end, in place of the first, the result
        tiles(stages, Y, H),  # k
        tiles(stages, Y, H),  # v
        plgpu.SMEM((CONSUMERS, X), jnp.float32),  # lse
        tiles(CONSUMERS, X, Y) if interpret else None,
        plgpu.Barrier(num_barriers=A * CONSUMERS),  # a rotation has arrived
        plgpu.Barrier(num_barriers=stages),  # k has arrived
        plgpu.Barrier(num_barriers=stages),  # v has arrived
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),  # k has been read by all
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),  # v has been read by all
        plgpu.Barrier(num_barriers=CONSUMERS),  # it is this consumer's turn
    ]


def _visits(sizes: Sizes, masks: Masks):
    """The visit list. A block without visible pairs has no entry; its program writes zeros anyway."""
    return visits_of(masks, sizes.block_q, sizes.block_k, cover=False)


def _full(shape, x, layout):
    return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def _sums(products, *starts, interpret):
    """The accumulators after products(*accumulators), which start with these values."""
    if not interpret:
        return pl.run_state(lambda accs: products(*accs))(tuple(plgpu.ACC.init(x) for x in starts))

    # The interpreter starts every accumulator with zeros.
    def from_zero(*accs):
        products(*accs)
        return [start + acc[...] for start, acc in zip(starts, accs, strict=True)]

    return pl.run_scoped(from_zero, *[plgpu.ACC(x.shape) for x in starts])


# ---------------------------------------------------------------------- with gradients


class Static(NamedTuple):
    """What is fixed when the kernels are compiled."""

    sizes: Sizes
    backward: tuple[int | None, int | None]  # block_q and block_k of the backward kernels, None for their own
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, rotations, k, v, masks):
    return _forward(static.sizes, static.interpret, rotations, k, v, masks)


def _attend_forward(static, *inputs):
    out, lse_BTN = _attend(static, *inputs)
    return (out, lse_BTN), (*inputs, out, lse_BTN)


def _attend_backward(static, residuals, cotangents):
    block_q, block_k = static.backward
    dq, dk, dv, dscale_B = gpu_backward.backward(
        *residuals, *cotangents, block_q=block_q, block_k=block_k, interpret=static.interpret
    )
    return dq, dk, dv, cotangent(dscale_B)


_attend.defvjp(_attend_forward, _attend_backward)
_attend_compiled = jax.jit(_attend, static_argnums=0)


def attend(rotations, k, v, masks: Masks, *, block_q=None, block_k=None, stages=None):
    """blockwise.attend on a Hopper GPU: (out [B, T, N, H] in the query's dtype, lse float32 [B, T, N]).

    Differentiable in rotations, k, v and masks.scale_B, from both results. Sizes not given are those of blocks.py.

    Raises:
        NotImplementedError: not a Hopper GPU, not bfloat16, or a head width other than 64 and 128.
    """
    on = require("gpu", ("hopper",))
    for name, x in [*[("q", q) for q in rotations], ("k", k), ("v", v)]:
        if x.dtype != jnp.bfloat16:  # float32 would be rounded to 10 bits (tf32) on its way into the tensor cores
            raise NotImplementedError(f"needs bfloat16, {name} is {x.dtype}")
    sizes = _sizes(k.shape[-1], on, block_q, block_k, stages)
    static = Static(sizes, (block_q, block_k), on.interpret)
    return _attend_compiled(static, rotations, k, v, masks)


def _sizes(H: int, on: Target, block_q=None, block_k=None, stages=None) -> Sizes:
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    if block_q not in (None, CONSUMERS * ROWS):
        raise ValueError(f"block_q={block_q}: {CONSUMERS} consumers of {ROWS} rows each make it {CONSUMERS * ROWS}")
    row = block_sizes(BLOCKS, on, f"gpu {H}")
    return Sizes(CONSUMERS * ROWS, block_k or row["forward_k"], stages or row["forward_stages"])


# ---------------------------------------------------------------------- what it costs


def count(*BTSNKH, on: Target, **options) -> dict:
    """{"forward": .., "backward": ..} of count_forward and gpu_backward.count_backward."""
    return {
        "forward": count_forward(*BTSNKH, on=on, **options),
        "backward": gpu_backward.count_backward(*BTSNKH, **options),
    }


def count_forward(B, T, S, N, K, H, *, on: Target, chunk_len=None, window=None, positions_BT=None) -> Count:
    """Of one call of flash_attention, or of dual_chunk_attention if chunk_len is given.

    The keys are at positions 0..S-1 and the queries are the last T of them, unless `positions_BT` says otherwise.
    """
    A, sizes = 1 if chunk_len is None else CHUNK_REGIONS, _sizes(H, on)
    masks = last_queries(B, T, S, window=window, chunk_len=chunk_len, positions_BT=positions_BT)
    starts = np.asarray(jax.jit(lambda masks: _visits(sizes, masks).starts)(masks), np.int64)
    visits, used = int(starts[-1]), int(np.sum(starts[1:] > starts[:-1]))  # used: (program, rotation) with a visit
    programs = B * pl.cdiv(T, sizes.block_q)  # of each head
    kv_bytes = visits * 2 * sizes.block_k * H * 2
    q_bytes = (used + programs) * sizes.block_q * H * 2 + programs * sizes.block_q * 4  # rotations; out and lse
    return Count(
        flops=visits * N * 2 * (2 * sizes.block_q * sizes.block_k * H),
        hbm_bytes=N * q_bytes + K * kv_bytes,
        fast_memory_bytes=scratch_bytes(_scratch(sizes, A, H, False)),
        l2_bytes=N * (q_bytes + kv_bytes),
    )
