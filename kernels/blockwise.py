# SPDX-License-Identifier: Apache-2.0
"""Attention by blocks with a running softmax: the loop under the "xla" flash_attention and dual_chunk_attention.

For each block of queries it visits the blocks of keys that some query may see, keeping per row the largest logit so
far, the sum of exponentials and the weighted sum of values (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al.
2022, arXiv:2205.14135). Nothing of size T x S exists; the backward pass recomputes the probabilities from the
log-sum-exp of each row. Pairs of blocks without a visible pair are skipped, so the work follows the mask.

The query comes in A rotations: one for ordinary attention, three for Dual Chunk Attention, where the chunks of query
and key say which one scores a pair. The loop runs over chunks of keys, counted back from the chunk of the block's last
query, and within one over the key blocks that have a key in it (the softmax does not mind the order). On each step back
every row of the block has one rotation, so the rows that a step needs are put together before it, and a pair of blocks
costs what it costs in ordinary attention. Only a key block with a chunk boundary inside is visited once more.

B batch, T query length, S key length, N query heads, K kv heads, G = N // K, H head width, A rotations of the query;
I query blocks, X rows of one (its queries times G: the heads that share keys become rows of one product, so nothing is
repeated); J key blocks, Y keys of one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .masks import Masks, Tokens, cotangent
from .visibility import CHUNK_REGIONS, Bounds, all_see, bounds, may_see, visible

LOWEST = jnp.finfo(jnp.float32).min  # start of the running maximum: finite, so an empty row never computes inf - inf
# Queries and keys of a block, at most. On CPU 128 x 128 is the fastest of 32..256 x 64..512, or within noise of it, for
# 512 and 2048 tokens, G of 1 and 7, H of 64 and 128, forward and backward: 2 to 4 times faster than one plain softmax.
BLOCK = 128


def attend(rotations, k, v, masks: Masks, *, block_q=None, block_k=None):
    """Attention of the rotated queries, a tuple of A arrays [B, T, N, H], over k and v [B, S, K, H].

    Returns (out [B, T, N, H] in the query's dtype, lse float32 [B, T, N]). A row that sees nothing gets zeros and
    lse = -inf. Differentiable in rotations, k, v and masks.scale_B, from both results.
    """
    blocks = block_q or block_size(rotations[0].shape[1]), block_k or block_size(k.shape[1])
    return _attend(blocks, rotations, k, v, masks)


def block_size(length):
    """Tokens per block: `length` cut into equal blocks of at most BLOCK, a multiple of 8; at least 2 tokens."""
    count = max(1, -(-length // BLOCK))
    size = -(-length // count)
    return max(2, size if count == 1 else -(-size // 8) * 8)


# ---------------------------------------------------------------------- cutting arrays into blocks and back


def _pad(x, block, fill=0):
    """x [B, tokens, ...] filled up to whole blocks."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _query_blocks(x_BTNH, K, block):
    """[B, T, N, H] -> [I, B, K, X, H]; X runs over (query, head of the group)."""
    B, _, N, H = x_BTNH.shape
    x = _pad(x_BTNH, block).reshape(B, -1, block, K, N // K, H)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(-1, B, K, block * (N // K), H)


def _query_unblocks(x_IBKXH, T, block):
    """[I, B, K, X, H] -> [B, T, N, H]."""
    I, B, K, X, H = x_IBKXH.shape
    x = x_IBKXH.reshape(I, B, K, block, X // block, H).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, I * block, K * (X // block), H)[:, :T]


def _key_blocks(x_BSKH, block):
    """[B, S, K, H] -> [J, B, K, Y, H]."""
    B, _, K, H = x_BSKH.shape
    return _pad(x_BSKH, block).reshape(B, -1, block, K, H).transpose(1, 0, 3, 2, 4)


def _key_unblocks(x_JBKYH, S):
    """[J, B, K, Y, H] -> [B, S, K, H]."""
    J, B, K, Y, H = x_JBKYH.shape
    return x_JBKYH.transpose(1, 0, 3, 2, 4).reshape(B, J * Y, K, H)[:, :S]


def _token_blocks(tokens: Tokens, block, repeats=1):
    """Tokens cut into blocks, [blocks, B, tokens of a block * repeats]; filled up with padding (position -1)."""

    def cut(x, fill):
        B = x.shape[0]
        return jnp.repeat(_pad(x, block, fill).reshape(B, -1, block).swapaxes(0, 1), repeats, axis=-1)

    return Tokens(cut(tokens.positions, -1), None if tokens.segments is None else cut(tokens.segments, 0))


# ---------------------------------------------------------------------- one pair of blocks


class Step(NamedTuple):
    """One step back over chunks of keys: the keys whose chunk lies `back` before `newest_B`; at `last_B`, all older."""

    back: jax.Array  # int32 []
    newest_B: jax.Array
    last_B: jax.Array

    def of(self, kv_positions, chunk_len):
        """The step that keys belong to; newest and last broadcast from [B, 1, ...]."""
        spread = [x.reshape(x.shape + (1,) * (kv_positions.ndim - 1)) for x in (self.newest_B, self.last_B, chunk_len)]
        newest, last, chunk_len = spread
        return jnp.clip(newest - kv_positions // chunk_len, 0, last)


def _mask(s_BKXY, q: Tokens, kv: Tokens, q_bounds: Bounds, kv_bounds: Bounds, masks: Masks, step):
    """-inf for the pairs of tokens that do not see each other or are of another step; q is [B, X], kv [B, Y]."""
    rows, keys = (lambda x: None if x is None else x[:, :, None]), (lambda x: None if x is None else x[:, None, :])

    def masked():
        at = rows(q.positions), keys(kv.positions)
        window = None if masks.window_B is None else masks.window_B[:, None, None]
        seen_BXY = visible(*at, rows(q.segments), keys(kv.segments), window)
        if step is not None:
            seen_BXY &= keys(step.of(kv.positions, masks.chunk_len_B) == step.back)
        return jnp.where(seen_BXY[:, None], s_BKXY, -jnp.inf)

    whole_B = all_see(q_bounds, kv_bounds, masks.window_B)
    if step is not None:  # a block is visited for the whole batch; it may be of another step in some rows
        of_this_step = [step.of(at_B, masks.chunk_len_B) == step.back for at_B in (kv_bounds.low, kv_bounds.high)]
        whole_B &= of_this_step[0] & of_this_step[1]
    return lax.cond(jnp.all(whole_B), lambda: s_BKXY, masked)


def _product(x, y, equation):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------- the loops


def _key_block_order(q_bounds: Bounds, kv_bounds: Bounds, masks: Masks, step):
    """(order [J], count): the key blocks that this query block has to visit are order[:count], in ascending order.

    q_bounds are [B], kv_bounds [J, B]; a block is visited if some row of the batch may need it on this step.
    """
    needed_JB = may_see(q_bounds, kv_bounds, masks.window_B)
    if step is not None:
        nearest_JB, furthest_JB = (
            jax.vmap(lambda at_B: step.of(at_B, masks.chunk_len_B))(x) for x in (kv_bounds.high, kv_bounds.low)
        )
        needed_JB &= (nearest_JB <= step.back) & (step.back <= furthest_JB)
    needed_J = jnp.any(needed_JB, axis=-1)
    return jnp.argsort(~needed_J, stable=True), jnp.sum(needed_J)


def _for_each_step(q_ABKXH, q: Tokens, q_bounds: Bounds, masks: Masks, body, carry):
    """body(step, its query [B, K, X, H], its mine_A, carry), one step back after the other.

    mine_A [B, 1, X, 1] are the rows that take each rotation. Without chunks there is one step, and it is None.
    """
    if masks.chunk_len_B is None:
        return body(None, q_ABKXH[0], [True], carry)
    newest_B, oldest_B = q_bounds.high // masks.chunk_len_B, q_bounds.low // masks.chunk_len_B
    last_B = jnp.where(q_bounds.high < 0, 0, newest_B - oldest_B) + CHUNK_REGIONS - 1

    def one_step(back, carry):
        key_chunk_B1 = (newest_B - back)[:, None]
        region_BX = jnp.clip(q.positions // masks.chunk_len_B[:, None] - key_chunk_B1, 0, CHUNK_REGIONS - 1)
        mine_A = [(region_BX == a)[:, None, :, None] for a in range(CHUNK_REGIONS)]
        q_BKXH = jnp.where(mine_A[0], q_ABKXH[0], jnp.where(mine_A[1], q_ABKXH[1], q_ABKXH[2]))
        return body(Step(back, newest_B, last_B), q_BKXH, mine_A, carry)

    return lax.fori_loop(0, jnp.max(last_B) + 1, one_step, carry)


def _at(tree, j):
    return jax.tree.map(lambda x: x[j], tree)


def _forward(blocks, rotations, k, v, masks: Masks):
    block_q, block_k = blocks
    (_, T, N, H), K = rotations[0].shape, k.shape[2]
    q_IABKXH = jnp.stack([_query_blocks(q, K, block_q) for q in rotations], axis=1)
    k_JBKYH, v_JBKYH = _key_blocks(k, block_k), _key_blocks(v, block_k)
    q_side = _token_blocks(masks.q, block_q, N // K)
    kv_side = _token_blocks(masks.kv, block_k)
    kv_bounds = bounds(*kv_side)
    scale = masks.scale_B[:, None, None, None]

    def query_block(inputs):
        q_ABKXH, q_here = inputs
        q_bounds = bounds(*q_here)

        def one_step(step, q_BKXH, _, carry):
            order, count = _key_block_order(q_bounds, kv_bounds, masks, step)

            def visit(n, carry):
                top_BKX, total_BKX, acc_BKXH = carry
                j = order[n]
                s_BKXY = _product(q_BKXH, k_JBKYH[j], "bkxh,bkyh->bkxy") * scale
                s_BKXY = _mask(s_BKXY, q_here, _at(kv_side, j), q_bounds, _at(kv_bounds, j), masks, step)
                new_top_BKX = jnp.maximum(top_BKX, s_BKXY.max(-1))
                p_BKXY = jnp.exp(s_BKXY - new_top_BKX[..., None])
                shrink_BKX = jnp.exp(top_BKX - new_top_BKX)
                acc_BKXH = acc_BKXH * shrink_BKX[..., None] + _product(
                    p_BKXY.astype(v.dtype), v_JBKYH[j], "bkxy,bkyh->bkxh"
                )
                return new_top_BKX, total_BKX * shrink_BKX + p_BKXY.sum(-1), acc_BKXH

            return lax.fori_loop(0, count, visit, carry)

        rows = q_ABKXH.shape[1:4]
        start = jnp.full(rows, LOWEST), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, H), jnp.float32)
        top_BKX, total_BKX, acc_BKXH = _for_each_step(q_ABKXH, q_here, q_bounds, masks, one_step, start)
        some = total_BKX > 0
        total_BKX = jnp.where(some, total_BKX, 1)
        lse_BKX = jnp.where(some, top_BKX + jnp.log(total_BKX), -jnp.inf)
        return (acc_BKXH / total_BKX[..., None]).astype(rotations[0].dtype), lse_BKX

    out_IBKXH, lse_IBKX = lax.map(query_block, (q_IABKXH, q_side))
    return _query_unblocks(out_IBKXH, T, block_q), _query_unblocks(lse_IBKX[..., None], T, block_q)[..., 0]


def _backward(blocks, residuals, cotangents):
    rotations, k, v, masks, out, lse_BTN = residuals
    dout, dlse_BTN = cotangents
    block_q, block_k = blocks
    (_, T, N, _), (S, K), dtype = rotations[0].shape, k.shape[1:3], rotations[0].dtype
    q_IABKXH = jnp.stack([_query_blocks(q, K, block_q) for q in rotations], axis=1)
    k_JBKYH, v_JBKYH = _key_blocks(k, block_k), _key_blocks(v, block_k)
    q_side = _token_blocks(masks.q, block_q, N // K)
    kv_side = _token_blocks(masks.kv, block_k)
    kv_bounds = bounds(*kv_side)
    scale = masks.scale_B[:, None, None, None]

    # d logit = p * (dp - delta); a cotangent of lse adds p * dlse, so it is only another part of delta.
    empty_BTN = lse_BTN == -jnp.inf
    delta_BTN = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse_BTN
    per_row = jnp.stack([jnp.where(empty_BTN, 0, lse_BTN), jnp.where(empty_BTN, 0, delta_BTN)], axis=-1)
    inputs = q_IABKXH, _query_blocks(dout, K, block_q), _query_blocks(per_row, K, block_q), q_side

    def query_block(carry, inputs):
        q_ABKXH, dout_BKXH, per_row_BKX2, q_here = inputs
        lse_BKX, delta_BKX = per_row_BKX2[..., 0], per_row_BKX2[..., 1]
        q_bounds = bounds(*q_here)

        def one_step(step, q_BKXH, mine_A, carry):
            dq_ABKXH, dk_JBKYH, dv_JBKYH = carry
            order, count = _key_block_order(q_bounds, kv_bounds, masks, step)

            def visit(n, carry):
                dq_BKXH, dk_JBKYH, dv_JBKYH = carry
                j = order[n]
                s_BKXY = _product(q_BKXH, k_JBKYH[j], "bkxh,bkyh->bkxy") * scale - lse_BKX[..., None]
                p_BKXY = jnp.exp(_mask(s_BKXY, q_here, _at(kv_side, j), q_bounds, _at(kv_bounds, j), masks, step))
                dp_BKXY = _product(dout_BKXH, v_JBKYH[j], "bkxh,bkyh->bkxy")
                ds_BKXY = (p_BKXY * (dp_BKXY - delta_BKX[..., None])).astype(dtype)
                dq_BKXH += _product(ds_BKXY, k_JBKYH[j], "bkxy,bkyh->bkxh")
                dk = dk_JBKYH[j] + _product(ds_BKXY, q_BKXH, "bkxy,bkxh->bkyh")
                dv = dv_JBKYH[j] + _product(p_BKXY.astype(dtype), dout_BKXH, "bkxy,bkxh->bkyh")
                return dq_BKXH, dk_JBKYH.at[j].set(dk), dv_JBKYH.at[j].set(dv)

            nothing = jnp.zeros(q_BKXH.shape, jnp.float32)
            dq_BKXH, dk_JBKYH, dv_JBKYH = lax.fori_loop(0, count, visit, (nothing, dk_JBKYH, dv_JBKYH))
            dq_ABKXH += jnp.stack([jnp.where(mine, dq_BKXH, 0) for mine in mine_A])
            return dq_ABKXH, dk_JBKYH, dv_JBKYH

        nothing = jnp.zeros(q_ABKXH.shape, jnp.float32)
        dq_ABKXH, *carry = _for_each_step(q_ABKXH, q_here, q_bounds, masks, one_step, (nothing, *carry))
        dscale_B = jnp.sum(dq_ABKXH * q_ABKXH, axis=(0, 2, 3, 4))  # the logits are linear in q and in the scale alike
        return tuple(carry), ((dq_ABKXH * scale).astype(dtype), dscale_B)

    zeros = jnp.zeros(k_JBKYH.shape, jnp.float32)
    (dk_JBKYH, dv_JBKYH), (dq_IABKXH, dscale_IB) = lax.scan(query_block, (zeros, zeros), inputs)
    dq = tuple(_query_unblocks(dq_IABKXH[:, a], T, block_q) for a in range(len(rotations)))
    dk, dv = _key_unblocks((dk_JBKYH * scale).astype(k.dtype), S), _key_unblocks(dv_JBKYH.astype(v.dtype), S)
    return dq, dk, dv, cotangent(dscale_IB.sum(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks, rotations, k, v, masks):
    return _forward(blocks, rotations, k, v, masks)


def _attend_forward(blocks, *inputs):
    out, lse_BTN = _forward(blocks, *inputs)
    return (out, lse_BTN), (*inputs, out, lse_BTN)


_attend.defvjp(_attend_forward, _backward)
