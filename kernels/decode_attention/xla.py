# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain XLA: a running softmax over blocks of the cache, up to the last position that is used.

B batch, T queries per row (few), S cache length, N query heads, K kv heads, H head width, A rotations of the query
(1, or 3 with chunks), X query rows that share a key head (T times N / K), Y cache slots of a block.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..blockwise import LOWEST
from ..visibility import FAR, Bounds, block_region, bounds, chunk_region, visible

# One pass over a cache of up to WHOLE slots beats the loop on CPU, whose blocks are copied out of the cache first: for
# 2048 slots by 1.5x when the cache is full. Longer caches are visited in blocks, so short answers do not pay for them.
WHOLE = 2048
BLOCK = 1024


@jax.jit
def decode_attention(q, q_succ, q_inter, k, v, *, chunk_len_B, q_positions_BT, window_B, scale_B):
    """Returns out [B, T, N, H] in q's dtype. Not differentiable where the cache is longer than WHOLE slots."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    X = T * (N // K)
    rotations = (q,) if chunk_len_B is None else (q, q_succ, q_inter)
    q_ABKXH = [x.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, X, H) for x in rotations]
    at_BX = jnp.repeat(q_positions_BT, N // K, axis=1)
    at = bounds(q_positions_BT)
    scale, window = scale_B[:, None, None, None], None if window_B is None else window_B[:, None, None]
    block = S if S <= WHOLE else BLOCK
    score = _score_whole if block == S else _score

    def visit(j, carry):
        top_BKX, total_BKX, acc_BKXH = carry
        start = jnp.minimum(j * block, S - block)  # the last block reaches back into the one before
        k_BYKH, v_BYKH = (lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, v))
        slot_Y = start + jnp.arange(block)
        new_Y = jnp.where(slot_Y >= j * block, slot_Y, -1)
        s_BKXY = score(q_ABKXH, k_BYKH, at_BX, at, slot_Y, chunk_len_B) * scale
        s_BKXY = jnp.where(visible(at_BX[:, :, None], new_Y, window=window)[:, None], s_BKXY, -jnp.inf)
        new_top_BKX = jnp.maximum(top_BKX, s_BKXY.max(-1))
        p_BKXY = jnp.exp(s_BKXY - new_top_BKX[..., None])
        shrink_BKX = jnp.exp(top_BKX - new_top_BKX)
        acc_BKXH = acc_BKXH * shrink_BKX[..., None] + _weighted_sum(p_BKXY, v_BYKH)
        return new_top_BKX, total_BKX * shrink_BKX + p_BKXY.sum(-1), acc_BKXH

    start = jnp.full((B, K, X), LOWEST), jnp.zeros((B, K, X), jnp.float32), jnp.zeros((B, K, X, H), jnp.float32)
    if block == S:
        _, total_BKX, acc_BKXH = visit(0, start)
    else:
        first, end = blocks_to_visit(at, S, block, window_B)
        _, total_BKX, acc_BKXH = lax.fori_loop(first, end, visit, start)
    out_BKXH = acc_BKXH / jnp.where(total_BKX > 0, total_BKX, 1)[..., None]
    return out_BKXH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)


def blocks_to_visit(at: Bounds, S, block, window_B=None):
    """(first, end): the blocks of the cache that hold everything the queries, standing within `at` [B], can see."""
    lowest_B = jnp.zeros_like(at.low) if window_B is None else jnp.maximum(at.low - window_B + 1, 0)
    lowest, highest = jnp.min(lowest_B), jnp.minimum(jnp.max(at.high), S - 1)
    return lowest // block, highest // block + 1


def _score_whole(q_ABKXH, k_BYKH, at_BX, at: Bounds, slot_Y, chunk_len_B):
    """As `_score`, for one pass over the whole cache: one product for all rotations, which reads the keys once.

    It has no branch, because XLA:CPU copies a cache that is handed to a branch, at every step of a generation.
    """
    if chunk_len_B is None:
        return _query_key(q_ABKXH[0], k_BYKH)
    s_ABKXY = jnp.split(_query_key(jnp.concatenate(q_ABKXH, axis=2), k_BYKH), len(q_ABKXH), axis=2)
    return _by_region(s_ABKXY, at_BX, slot_Y, chunk_len_B)


def _by_region(s_ABKXY, at_BX, slot_Y, chunk_len_B):
    """Of the scores of all rotations, the one that each slot's region asks for."""
    region_BXY = chunk_region(at_BX[:, :, None], slot_Y, chunk_len_B[:, None, None])
    return lax.select_n(jnp.broadcast_to(region_BXY[:, None], s_ABKXY[0].shape), *s_ABKXY)


def _score(q_ABKXH, k_BYKH, at_BX, at: Bounds, slot_Y, chunk_len_B):
    """q.k in float32, [B, K, X, Y], with the rotation of each slot's region; one product where one serves all."""
    if chunk_len_B is None:
        return _query_key(q_ABKXH[0], k_BYKH)
    block = Bounds(slot_Y[0], slot_Y[-1], None, None)
    # Slots after a query are invisible, so only those up to the query decide; a row of padding does not count.
    seen = block._replace(high=jnp.minimum(block.high, at.high))
    region_B, whole_B = block_region(at, seen, chunk_len_B)

    def own_chunk():
        return _query_key(q_ABKXH[0], k_BYKH)

    def by_slot():
        return _by_region([_query_key(q_BKXH, k_BYKH) for q_BKXH in q_ABKXH], at_BX, slot_Y, chunk_len_B)

    return lax.cond(jnp.all((whole_B & (region_B == 0)) | (at.low == FAR)), own_chunk, by_slot)


def _query_key(q_BKXH, k_BYKH):
    if q_BKXH.shape[2] == 1:  # a product with one row is slow on CPU (ten times, in bfloat16): multiply and add instead
        q_B1KH = q_BKXH.swapaxes(1, 2).astype(jnp.float32)
        return (q_B1KH * k_BYKH.astype(jnp.float32)).sum(-1).swapaxes(1, 2)[:, :, None]
    return jnp.einsum("bkxh,bykh->bkxy", q_BKXH, k_BYKH, preferred_element_type=jnp.float32)


def _weighted_sum(p_BKXY, v_BYKH):
    if p_BKXY.shape[2] == 1:
        p_BYK1 = p_BKXY[:, :, 0].swapaxes(1, 2)[..., None]
        return (p_BYK1 * v_BYKH.astype(jnp.float32)).sum(1)[:, :, None]
    return jnp.einsum("bkxy,bykh->bkxh", p_BKXY.astype(v_BYKH.dtype), v_BYKH, preferred_element_type=jnp.float32)
