# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain XLA: a running softmax over blocks of the cache, up to the last position that is used.

B batch, T queries per row (few), S slots of a row, N query heads, K kv heads, H head width, A rotations of the query
(1, or 3 with chunks), X query rows that share a key head (T times N / K), Y slots of a block (whole pages, or a part
of a long one).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..blockwise import LOWEST
from ..masks import Masks
from ..visibility import FAR, Bounds, block_regions, bounds, chunk_region, visible
from .cache import Cache

# One pass over a cache of up to WHOLE slots beats the loop on CPU, whose blocks are copied out of the cache first: for
# 2048 slots by 1.5x when the cache is full. Longer caches are visited in blocks, so short answers do not pay for them.
WHOLE = 2048
BLOCK = 1024
# Of short pages, so many slots at a time, however many a row has: the same order of sums whatever the longest row is,
# and a step of short rows gathers little. With 256, XLA:CPU sums in another order where there are few rows.
OF_PAGES = 512


class Side(NamedTuple):
    """Keys or values of a block, [B, K, Y, H], and for int8 the scale of each, [B, K, Y]."""

    values: jax.Array
    scale: Any


@functools.partial(jax.jit, static_argnames="return_lse")
def decode_attention(rotations, cache: Cache, masks: Masks, *, return_lse):
    """Returns (out [B, T, N, H] in q's dtype, lse or None). Not differentiable beyond a cache of WHOLE slots."""
    q, k, chunk_len_B = rotations[0], cache.k, masks.chunk_len_B
    (B, T, N, H), K, S = q.shape, k.shape[1], cache.slots
    X = T * (N // K)
    q_ABKXH = [x.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, X, H) for x in rotations]
    at_BT = cache.slots_of(masks)
    at_BX, at = jnp.repeat(at_BT, N // K, axis=1), bounds(at_BT)
    scale = masks.scale_B[:, None, None, None]
    window = None if masks.window_B is None else masks.window_B[:, None, None]
    block = block_size(k, cache.block_table_BP, S)
    score = _score_whole if block == S else _score

    def cut(x, start):
        """Slots [start, start + block) of keys, values or their scales, [B, K, Y, ...]."""
        if x is None:
            return None
        if cache.block_table_BP is None:
            return lax.dynamic_slice_in_dim(x, start, block, axis=2)
        length = x.shape[2]
        pages = lax.dynamic_slice_in_dim(cache.pages_BP, start // length, -(-block // length), axis=1)
        if block < length:  # part of one long page
            part = jax.vmap(lambda page: lax.dynamic_slice_in_dim(x[page], start % length, block, axis=1))
            return part(pages[:, 0])
        return x[pages].swapaxes(1, 2).reshape(B, K, block, *x.shape[3:])

    def visit(j, carry):
        top_BKX, total_BKX, acc_BKXH = carry
        start = jnp.minimum(j * block, S - block)  # the last block reaches back into the one before
        keys = Side(cut(k, start), cut(cache.k_scale, start))
        values = Side(cut(cache.v, start), cut(cache.v_scale, start))
        slot_Y = start + jnp.arange(block)
        new_Y = jnp.where(slot_Y >= j * block, slot_Y, -1)
        s_BKXY = score(q_ABKXH, keys, at_BX, at, slot_Y, chunk_len_B, cache.first) * scale
        s_BKXY = jnp.where(visible(at_BX[:, :, None], new_Y, window=window)[:, None], s_BKXY, -jnp.inf)
        new_top_BKX = jnp.maximum(top_BKX, s_BKXY.max(-1))
        p_BKXY = jnp.exp(s_BKXY - new_top_BKX[..., None])
        shrink_BKX = jnp.exp(top_BKX - new_top_BKX)
        acc_BKXH = acc_BKXH * shrink_BKX[..., None] + _weighted_sum(p_BKXY, values, q.dtype)
        return new_top_BKX, total_BKX * shrink_BKX + p_BKXY.sum(-1), acc_BKXH

    start = jnp.full((B, K, X), LOWEST), jnp.zeros((B, K, X), jnp.float32), jnp.zeros((B, K, X, H), jnp.float32)
    if block == S:
        top_BKX, total_BKX, acc_BKXH = visit(0, start)
    else:
        begin, end = blocks_to_visit(at, S, block, masks.window_B)
        top_BKX, total_BKX, acc_BKXH = lax.fori_loop(begin, end, visit, start)

    def of_queries(x_BKX_):
        x_BKTG_ = x_BKX_.reshape(B, K, T, N // K, *x_BKX_.shape[3:])
        return x_BKTG_.swapaxes(1, 2).reshape(B, T, N, *x_BKX_.shape[3:])

    some_BKX = total_BKX > 0
    total_BKX = jnp.where(some_BKX, total_BKX, 1)
    out = of_queries(acc_BKXH / total_BKX[..., None]).astype(q.dtype)
    return out, of_queries(jnp.where(some_BKX, top_BKX + jnp.log(total_BKX), -jnp.inf)) if return_lse else None


def block_size(k, block_table_BP, S):
    """Slots of a block: all S of a short cache, BLOCK of a long one; in pages, as many whole ones as OF_PAGES takes, or
    one, or a part of one that has a row's slots to itself."""
    length = k.shape[2]
    if block_table_BP is not None and length < S:
        return min(S, max(1, OF_PAGES // length) * length)
    return S if S <= WHOLE else BLOCK if block_table_BP is None or length % BLOCK == 0 else length


def blocks_to_visit(at: Bounds, S, block, window_B=None):
    """(begin, end): the blocks of the cache that hold everything the queries, with their own slots in `at`, can see."""
    lowest_B = jnp.zeros_like(at.low) if window_B is None else jnp.maximum(at.low - window_B + 1, 0)
    lowest, highest = jnp.min(lowest_B), jnp.minimum(jnp.max(at.high), S - 1)
    return lowest // block, highest // block + 1


def _score_whole(q_ABKXH, keys: Side, at_BX, at: Bounds, slot_Y, chunk_len_B, first):
    """As `_score`, for one pass over the whole cache: one product for all rotations, which reads the keys once.

    It has no branch, because XLA:CPU copies a cache that is handed to a branch, at every step of a generation.
    """
    if chunk_len_B is None:
        return _query_key(q_ABKXH[0], keys)
    s_ABKXY = jnp.split(_query_key(jnp.concatenate(q_ABKXH, axis=2), keys), len(q_ABKXH), axis=2)
    return _by_region(s_ABKXY, at_BX + first, slot_Y + first, chunk_len_B)


def _by_region(s_ABKXY, q_positions_BX, kv_positions_Y, chunk_len_B):
    """Of the scores of all rotations, the one that each key's region asks for."""
    region_BXY = chunk_region(q_positions_BX[:, :, None], kv_positions_Y, chunk_len_B[:, None, None])
    return lax.select_n(jnp.broadcast_to(region_BXY[:, None], s_ABKXY[0].shape), *s_ABKXY)


def _score(q_ABKXH, keys: Side, at_BX, at: Bounds, slot_Y, chunk_len_B, first):
    """q.k in float32, [B, K, X, Y], with the rotation of each slot's region; one product where one serves all."""
    if chunk_len_B is None:
        return _query_key(q_ABKXH[0], keys)
    # Slots after a query are invisible, so only those up to the query decide; a row of padding does not count.
    queries = Bounds(at.low + first, at.high + first, None, None)
    seen = Bounds(slot_Y[0] + first, jnp.minimum(slot_Y[-1], at.high) + first, None, None)
    _, furthest_B = block_regions(queries, seen, chunk_len_B)

    def own_chunk():
        return _query_key(q_ABKXH[0], keys)

    def by_slot():
        s_ABKXY = [_query_key(q_BKXH, keys) for q_BKXH in q_ABKXH]
        return _by_region(s_ABKXY, at_BX + first, slot_Y + first, chunk_len_B)

    return lax.cond(jnp.all((furthest_B == 0) | (at.low == FAR)), own_chunk, by_slot)


def _query_key(q_BKXH, keys: Side):
    k_BKYH, scale_BKY = keys
    if q_BKXH.shape[2] == 1:  # a product with one row is slow on CPU (ten times, in bfloat16): multiply and add instead
        s_BKXY = (q_BKXH.astype(jnp.float32) * k_BKYH.astype(jnp.float32)).sum(-1)[:, :, None]
    else:
        k_BKYH = k_BKYH if scale_BKY is None else k_BKYH.astype(q_BKXH.dtype)  # 127 is exact in any of them
        s_BKXY = jnp.einsum("bkxh,bkyh->bkxy", q_BKXH, k_BKYH, preferred_element_type=jnp.float32)
    return s_BKXY if scale_BKY is None else s_BKXY * scale_BKY[:, :, None]


def _weighted_sum(p_BKXY, values: Side, dtype):
    v_BKYH, scale_BKY = values
    if scale_BKY is not None:
        p_BKXY = p_BKXY * scale_BKY[:, :, None]
    if p_BKXY.shape[2] == 1:
        return (p_BKXY[:, :, 0, :, None] * v_BKYH.astype(jnp.float32)).sum(2)[:, :, None]
    v_BKYH = v_BKYH if scale_BKY is None else v_BKYH.astype(dtype)
    return jnp.einsum("bkxy,bkyh->bkxh", p_BKXY.astype(v_BKYH.dtype), v_BKYH, preferred_element_type=jnp.float32)
