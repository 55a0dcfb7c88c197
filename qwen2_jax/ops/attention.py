# SPDX-License-Identifier: Apache-2.0
"""Attention over given keys and over a cache, and writing the cache; on a mesh, each device's part."""

import itertools

import jax
import jax.numpy as jnp

from qwen2_jax.kernels import decode_attention as _decode
from qwen2_jax.kernels import flash_attention as _flash
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.ops.implementations import implementation_of
from qwen2_jax.ops.per_device import CACHE, FEW_QUERIES, axes_of_names, before_weights, on_each_device, per_row, widened

# R layers of a cache  B batch  T query  S key  N query heads  K kv heads  H head width
QUERY = ("batch", "length", "heads", None)
KEY = ("batch", "length", "kv_heads", None)
TOKENS = ("batch", "length")
STEP = ("batch", None, "heads", None)  # the queries of a decode step
ROW = ("batch",)


def attention(
    queries: tuple[jax.Array, ...],
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    chunk_len=None,
    window=None,
    scale=None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over keys with given positions: one query rotation (ordinary) or three (dual chunk).

    queries: (q_BTNH,) or (q_BTNH, q_succ_BTNH, q_inter_BTNH); chunk_len is used with three. window, chunk_len and
    scale are numbers or [B]. Returns [B, T, N, H].
    """

    masks = (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    numbers = (window, scale, None if len(queries) == 1 else chunk_len)
    args = (queries, k_BSKH, v_BSKH, masks, per_row(numbers, len(k_BSKH)))
    names = (QUERY, KEY, KEY, TOKENS, ROW)
    pieces = axes_of_names(args, names).get("length", ())
    name = implementation_of("attention", implementation)

    def run(queries, k_BSKH, v_BSKH, masks, numbers):
        if pieces:
            # Grouped heads make the keys of a whole row small: with 7 or 8 queries to a key, less than its activations.
            whole = lambda x: jax.lax.all_gather(x, pieces, axis=1, tiled=True)  # noqa: E731
            q_at, kv_at, q_in, kv_in = masks
            k_BSKH, v_BSKH, kv_at, kv_in = jax.tree.map(whole, (k_BSKH, v_BSKH, kv_at, kv_in))
            masks = q_at, kv_at, q_in, kv_in
        masks = dict(zip(("q_positions_BT", "kv_positions_BS", "q_segments_BT", "kv_segments_BS"), masks, strict=True))
        window, scale, chunk_len = numbers
        common = {**masks, "window": window, "scale": scale, "implementation": name}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k_BSKH, v_BSKH, **common)
        return dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, **common)

    return on_each_device(run, args, names, QUERY, name)


def cached_attention(
    queries: tuple[jax.Array, ...],
    k_RBKSH: jax.Array,
    v_RBKSH: jax.Array,
    repeat,
    *,
    q_positions_BT: jax.Array,
    scales: tuple[jax.Array, ...] = (),
    chunk_len=None,
    window=None,
    scale=None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over layer `repeat` of a cache whose slot index is the position: a decode step, or a prefill chunk.

    Which of the two is decided by T. scales: of the keys and values of a cache in int8, [R, B, K, S]. All else is as in
    `attention`.
    """
    few = q_positions_BT.shape[1] <= FEW_QUERIES
    queries = jax.tree.map(before_weights, queries)
    name = implementation_of("decode" if few else "attention", implementation)
    numbers = per_row((window, scale, None if len(queries) == 1 else chunk_len), k_RBKSH.shape[1])
    cache = (k_RBKSH, v_RBKSH, *scales)
    args = (queries, cache, q_positions_BT, numbers, jnp.asarray(repeat, jnp.int32))
    new, at = (STEP, ("batch", None)) if few else (QUERY, TOKENS)
    names = (new, CACHE, at, ROW, ())
    axes = axes_of_names(args, names)
    # Slots are sharded in the order of their positions. So the device with the most filled slots determines the time of
    # a chunk or step, until the last device's slots are filled too: up to twice the mean over a whole prompt, and for a
    # step with a half-full cache. Blocks of slots in round-robin order would balance this, but every kernel would have
    # to support it, and a cache is never more than twice as long as the request needs.
    shares, apart = axes.get("slots", ()), axes.get("length", ())

    def run(queries, cache, q_positions_BT, numbers, repeat):
        if not shares:
            return _attend_to_cache(name, queries, cache, repeat, q_positions_BT, *numbers)
        if apart:  # each query sees slots of every device
            gather = lambda x: jax.lax.all_gather(x, apart, axis=1, tiled=True)  # noqa: E731
            queries, q_positions_BT = jax.tree.map(gather, (queries, q_positions_BT))
        first = jax.lax.axis_index(shares) * cache[0].shape[3]
        out, lse_BTN = _attend_to_cache(
            name, queries, cache, repeat, q_positions_BT, *numbers, first=first, return_lse=True
        )
        return _merge(out, lse_BTN, shares, apart)

    out_BTNH = on_each_device(run, args, names, new, name)
    return before_weights(out_BTNH)


def write_cache(
    caches_RBKSH: tuple[jax.Array, ...],
    repeat,
    new_BTKH: tuple[jax.Array, ...],
    positions_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Each cache with the new tokens of layer `repeat` written to the slots of their positions.

    caches_RBKSH: keys and values; in int8 also the scales of both, [R, B, K, S], which come of the new tokens.
    Tokens whose position is negative (padding) or S and above are dropped. On a mesh every device writes its own slots,
    so no part of a cache moves.
    """
    new_BTKH = tuple(map(before_weights, new_BTKH))
    if caches_RBKSH[0].dtype == jnp.int8:
        new_BTKH = tuple(itertools.chain(*zip(*map(_decode.quantize_cache, new_BTKH), strict=True)))
    args = (caches_RBKSH, new_BTKH, positions_BT, jnp.asarray(repeat, jnp.int32))
    names = (CACHE, ("batch", None, "kv_heads", None), ("batch", None), ())
    shares = axes_of_names(args, names).get("slots", ())

    def run(caches_RBKSH, new_BTKH, positions_BT, repeat):
        S = caches_RBKSH[0].shape[3]
        slots_BT = positions_BT - jax.lax.axis_index(shares) * S if shares else positions_BT
        slots_BT = jnp.where(slots_BT < 0, S, slots_BT)
        where = (repeat, jnp.arange(len(positions_BT))[:, None], slice(None), slots_BT)
        write = lambda cache, new: cache.at[where].set(new.astype(cache.dtype), mode="drop")  # noqa: E731
        return jax.tree.map(write, caches_RBKSH, new_BTKH)

    return on_each_device(run, args, names, CACHE[:-1], None)


def _attend_to_cache(name, queries, cache, repeat, q_positions_BT, window, scale, chunk_len, first=0, return_lse=False):
    """One device's part of cached_attention: slot 0 holds the position `first`. cache: keys, values, their scales."""
    R, B, _, S, _ = cache[0].shape
    common = {"window": window, "scale": scale, "return_lse": return_lse, "implementation": name}
    if q_positions_BT.shape[1] > FEW_QUERIES:
        k_BKSH, v_BKSH, *scales = (x[repeat] for x in cache)
        k_scale, v_scale = scales or (None, None)
        k_BSKH, v_BSKH = (
            widened(x_BKSH, scale_BKS, queries[0].dtype).swapaxes(1, 2)
            for x_BKSH, scale_BKS in ((k_BKSH, k_scale), (v_BKSH, v_scale))
        )
        slots_BS = jnp.broadcast_to(first + jnp.arange(S, dtype=jnp.int32), (B, S))
        common |= {"q_positions_BT": q_positions_BT, "kv_positions_BS": slots_BS}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k_BSKH, v_BSKH, **common)
        return dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, **common)
    q, succ, inter = queries if len(queries) == 3 else (*queries, None, None)
    # A kernel's input is a whole array: a slice of the cache would be copied at every step. So each row of each layer
    # is passed as a page of S slots, and the block table has one page per row.
    k, v, *scales = (x.reshape(-1, *x.shape[2:]) for x in cache)
    k_scale, v_scale = scales or (None, None)
    pages_B1 = None if R == 1 else (repeat * B + jnp.arange(B, dtype=jnp.int32))[:, None]
    return _decode.decode_attention(
        q, succ, inter, k, v, q_positions_BT=q_positions_BT, block_table_BP=pages_B1, chunk_len=chunk_len,
        k_scale=k_scale, v_scale=v_scale, first=first, **common,
    )  # fmt: skip


def _merge(out_BTNH: jax.Array, lse_BTN: jax.Array, axes: tuple[str, ...], scatter: tuple[str, ...]) -> jax.Array:
    """Merges the outputs of the devices along `axes`, which attended to different keys, into one softmax; zeros where
    no device had a visible key. Over the axes `scatter`, each device keeps its part of the queries.
    """
    top_BTN = jax.lax.pmax(jax.lax.stop_gradient(lse_BTN), axes)
    weight_BTN = jnp.exp(lse_BTN - jnp.where(top_BTN == -jnp.inf, 0, top_BTN))
    sums = out_BTNH.astype(jnp.float32) * weight_BTN[..., None], weight_BTN
    if scatter:
        sums = jax.tree.map(lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True), sums)
    else:
        sums = jax.lax.psum(sums, axes)
    total_BTNH, total_BTN = sums
    return (total_BTNH / jnp.where(total_BTN > 0, total_BTN, 1)[..., None]).astype(out_BTNH.dtype)
