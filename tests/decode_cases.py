# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of decode_attention: ragged rows against a cache that is dense or paged, wide or int8."""

import jax
import jax.numpy as jnp
import numpy as np
from qwen2_jax.kernels.decode_attention import decode_attention, quantize_cache
from qwen2_jax.kernels.visibility import FAR

from attention_cases import arrays, naive
from tolerance import BFLOAT16, assert_no_worse


def case(seed, shape, dtype=jnp.float32, *, chunked=False, page=None, int8=False, share=False):
    """((queries..., k, v) and keyword arguments of decode_attention) of a shape (B, T, S, N, K, H).

    A row's queries are the last of what its cache holds, which is nothing, all, or more than all; some are padding, and
    windows are none or any. Every number is an array, so that a shape is compiled once. share: the cache does not begin
    at position 0; some rows have not reached it yet, others are far beyond.
    """
    B, T, S, *_ = shape
    random = np.random.default_rng(seed)
    queries, k, v, _ = arrays(seed, shape, dtype, rotations=3 if chunked else 1)
    first = random.integers(1, 2 * S, dtype=np.int32) if share else 0
    last = random.integers(first // 2 if share else -1, first + (3 * S if share else S + 2), (B, 1))
    at = np.where(last < 0, -1, last - T + 1 + np.arange(T))
    at = np.where(random.random((B, T)) < 0.2, -1, at).astype(np.int32)
    windows = random.integers(1, 2 * S + first, B) if random.random() < 0.5 else np.full(B, FAR)
    kwargs = {"q_positions_BT": at, "window": windows.astype(np.int32)}
    kwargs |= {"scale": random.uniform(0.1, 1, B).astype(np.float32)}
    if share:
        kwargs["first"] = first
    if chunked:
        kwargs["chunk_len"] = random.integers(2, 2 * S, B, dtype=np.int32)
    cache = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
    if int8:
        for name in ("k", "v"):
            cache[name], cache[f"{name}_scale"] = quantize_cache(cache[name])
    if page:
        cache = paged(random, cache, at - first, page)
    return (*queries, *(() if chunked else (None, None)), cache.pop("k"), cache.pop("v")), kwargs | cache


def paged(random, cache, at, page):
    """The same cache in pages of `page` slots, in no order; table entries that nobody needs name no page at all."""
    B, _, S, *_ = cache["k"].shape
    P = S // page
    order = random.permutation(B * P + 2)[: B * P].reshape(B, P)

    def in_pages(x):
        pages = np.zeros((B * P + 2, x.shape[1], page, *x.shape[3:]), x.dtype)
        pages[order] = np.asarray(x).reshape(B, x.shape[1], P, page, *x.shape[3:]).swapaxes(1, 2)
        return jnp.asarray(pages)

    needless = np.arange(P) * page > at.max(axis=1, keepdims=True)
    table = np.where(needless, random.choice([-7, 10**6], (B, P)), order).astype(np.int32)
    return jax.tree.map(in_pages, cache) | {"block_table_BP": table}


def plain(args, kwargs):
    """As anyone would write it, in the dtype of the queries, from the cache written out."""
    *queries, k, v = args
    kwargs = dict(kwargs)
    table = kwargs.pop("block_table_BP", None)

    def dense(x, scale):
        x = x if scale is None else (x * scale[..., None]).astype(args[0].dtype)
        if table is None:
            return x.swapaxes(1, 2)
        x = x[jnp.clip(table, 0, len(x) - 1)].swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    k, v = dense(k, kwargs.pop("k_scale", None)), dense(v, kwargs.pop("v_scale", None))
    slots = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    slots += kwargs.pop("first", 0)
    return naive([q for q in queries if q is not None], k, v, kv_positions_BS=slots, **kwargs)


@jax.jit
def expected(args, kwargs):
    """(out, lse) of plain code in the inputs' dtype, and of the definition in float32."""
    wide = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else x.astype(jnp.float32), args)
    return plain(args, kwargs), decode_attention(*wide, implementation="reference", return_lse=True, **kwargs)


def assert_right(got, args, kwargs):
    """`got`, which is out or (out, lse), is no worse than plain code and of the right dtype."""
    got, dtype = got if isinstance(got, tuple) else (got,), args[0].dtype
    assert [x.dtype for x in got] == [dtype, jnp.float32][: len(got)]
    for x, plain, exact in zip(got, *expected(args, kwargs), strict=False):
        assert_no_worse(x, plain, exact, floor=1e-5 if dtype == jnp.float32 or x.ndim == 3 else BFLOAT16)
