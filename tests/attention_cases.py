# SPDX-License-Identifier: Apache-2.0
"""Inputs for the attention tests: random arrays, layouts of tokens, and attention as anyone would write it."""

import jax.numpy as jnp
import numpy as np
from qwen2_jax.kernels.visibility import FAR, chunk_region, visible


def arrays(seed, shape, dtype=jnp.float32, rotations=1):
    """(rotations of q, k, v, weights for the results): standard normal."""
    B, T, S, N, K, H = shape
    random = np.random.default_rng(seed)
    draw = lambda *dims: jnp.asarray(random.standard_normal(dims), dtype)
    queries = tuple(draw(B, T, N, H) for _ in range(rotations))
    return queries, draw(B, S, K, H), draw(B, S, K, H), (draw(B, T, N, H), draw(B, T, N).astype(jnp.float32))


KINDS = ("continued", "packed", "shuffled", "padding")  # and "whole", of which a random test learns nothing new


def layout(kind, seed, shape, *, windowed=False, chunks=False):
    """Keyword arguments of an attention: where the tokens of a shape stand, with windows and scales per row.

    kind: "continued" (chunked prefill: the queries are the last tokens of a cache in use), "packed" (several documents
    in a row), "shuffled" (any order at all), "padding" (nothing is visible), "whole" (positions 0, 1, ... in every
    row). Every argument is always an array, so that a shape is compiled once.
    """
    B, T, S, *_ = shape
    random = np.random.default_rng(seed)
    q_segments, kv_segments = np.zeros((B, T)), np.zeros((B, S))
    if kind == "continued":
        used = random.integers(T, S + 1, (B, 1)) if S > T else np.full((B, 1), S)
        kv = np.where(np.arange(S) < used, np.arange(S), -1)
        q = used - T + np.arange(T)
        q = np.where(random.random((B, 1)) < 0.3, np.where(np.arange(T) < T // 2, q, -1), q)  # a ragged row
    elif kind == "packed":  # positions from zero in each document

        def pack(length):
            starts = np.sort(np.concatenate([[0], random.integers(0, length, 2)]))
            document = np.searchsorted(starts, np.arange(length), side="right") - 1
            return np.broadcast_to(np.arange(length) - starts[document], (B, length)), np.broadcast_to(
                document, (B, length)
            )

        (q, q_segments), (kv, kv_segments) = pack(T), pack(S)
    elif kind == "shuffled":
        q, kv = random.integers(-3, S, (B, T)), random.integers(-3, S, (B, S))
    elif kind == "whole":
        kv = np.broadcast_to(np.arange(S), (B, S))
        q = kv[:, S - T :]
    else:
        q, kv = np.full((B, T), -1), np.broadcast_to(np.arange(S), (B, S))
    window = random.integers(1, S, B) if windowed else np.full(B, FAR)
    layout = {"q_positions_BT": q, "kv_positions_BS": kv, "q_segments_BT": q_segments, "kv_segments_BS": kv_segments}
    layout = {name: np.asarray(x, np.int32) for name, x in (layout | {"window": window}).items()}
    layout["scale"] = random.uniform(0.1, 1, B).astype(np.float32)
    if chunks:
        layout["chunk_len"] = random.integers(3, S, B, dtype=np.int32)
    return layout


def naive(
    queries,
    k,
    v,
    *,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window=None,
    scale,
    chunk_len=None,
):
    """Attention as transformers' eager code makes it: logits in the input's dtype, softmax in float32.

    What the tolerance is measured with. Returns (out, lse).
    """
    B, T, N, H = queries[0].shape
    K = k.shape[2]
    as_row = lambda x: None if x is None else jnp.broadcast_to(x, (B,))[:, None, None]
    rows, keys = (lambda x: None if x is None else x[:, :, None]), (lambda x: None if x is None else x[:, None, :])
    seen = visible(
        rows(q_positions_BT), keys(kv_positions_BS), rows(q_segments_BT), keys(kv_segments_BS), as_row(window)
    )
    logits = [jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, -1, H), k) for q in queries]
    if chunk_len is not None:
        region = chunk_region(rows(q_positions_BT), keys(kv_positions_BS), as_row(chunk_len))[:, None, None]
        logits = [jnp.select([region == 0, region == 1], logits[:2], logits[2])]
    s = logits[0] * as_row(scale)[:, None, None].astype(k.dtype)
    s = jnp.where(seen[:, None, None], s.astype(jnp.float32), -1e30)
    p = jnp.where(seen[:, None, None], jnp.exp(s - s.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, s.max(-1, keepdims=True) + jnp.log(jnp.where(total == 0, 1, total)))
    out = jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v).reshape(B, T, N, H)
    return out, lse[..., 0].transpose(0, 3, 1, 2).reshape(B, T, N)
