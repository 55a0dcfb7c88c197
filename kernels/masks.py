# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees and how a visible pair is scored, as one value that every attention implementation is given.

The public functions take positions, segments, window, chunk length and scale as keywords. They check them and build one
`Masks` of them, once; everything below passes it on. The comparisons themselves are in visibility.py.

B batch, T query length, S key length, N query heads, K kv heads, H head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .visibility import spans, visible


class Tokens(NamedTuple):
    """Positions and segments (documents) of the queries, int [B, T], or of the keys, int [B, S]."""

    positions: jax.Array
    segments: jax.Array | None  # None: one segment


class Masks(NamedTuple):
    """The run-time data of an attention beside its arrays: a pytree, differentiable in scale_B alone."""

    q: Tokens
    kv: Any  # Tokens; None in decode_attention, whose keys are the slots of a cache
    window_B: jax.Array | None  # int32: how many tokens back a query sees, itself included; None: all
    chunk_len_B: jax.Array | None  # int32: positions in a chunk; None: ordinary attention, with one rotation
    scale_B: jax.Array  # float32: the factor on q.k

    def visible_BTS(self):
        """True where a query sees a key; the whole table, for references."""
        segments = (None, None) if self.q.segments is None else (self.q.segments[:, :, None], self.kv.segments[:, None])
        window = None if self.window_B is None else self.window_B[:, None, None]
        return visible(self.q.positions[:, :, None], self.kv.positions[:, None], *segments, window)

    def spans(self):
        """[(first, last)], a pair for each rotation, int [B, T]: the key positions that a query scores with it."""
        return spans(self.q.positions, *(None if x is None else x[:, None] for x in (self.window_B, self.chunk_len_B)))


def cotangent(dscale_B) -> Masks:
    """What the rule of a custom_vjp returns for its Masks: only the scale has a gradient."""
    nothing: Any = None
    return Masks(nothing, nothing, None, None, dscale_B)


def make_masks(
    queries,
    k,
    v,
    *,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window=None,
    chunk_len=None,
    scale=None,
) -> Masks:
    """The arguments of flash_attention and dual_chunk_attention, checked. `queries`: {argument name: [B, T, N, H]}.

    Raises:
        ValueError: shapes do not fit together, or a window or chunk_len is below 1 (where it is no traced array).
    """
    (first, q), *others = queries.items()
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{first} must be [B, T, N, H] and k [B, S, K, H], got {q.shape} and {k.shape}")
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if K == 0 or N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: N must be a multiple of K")
    expected: dict[str, Any] = {name: (x, (B, T, N, H)) for name, x in others}
    expected |= {"k": (k, (B, S, K, H)), "v": (v, (B, S, K, H)), "q_positions_BT": (q_positions_BT, (B, T))}
    expected |= {"kv_positions_BS": (kv_positions_BS, (B, S))}
    expected |= {"q_segments_BT": (q_segments_BT, (B, T)), "kv_segments_BS": (kv_segments_BS, (B, S))}
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit {first} {q.shape} and k {k.shape}, got {x.shape}")
    if (q_segments_BT is None) != (kv_segments_BS is None):
        raise ValueError("give both q_segments_BT and kv_segments_BS, or neither")
    q_tokens, kv_tokens = Tokens(q_positions_BT, q_segments_BT), Tokens(kv_positions_BS, kv_segments_BS)
    return Masks(q_tokens, kv_tokens, **row_numbers(q, window, chunk_len, scale))


def row_numbers(q, window, chunk_len, scale) -> dict[str, Any]:
    """{"window_B": .., "chunk_len_B": .., "scale_B": ..}: each a number or [B], as [B]; a scale of None is 1 / sqrt(H).

    Raises:
        ValueError: a shape does not fit, or window or chunk_len is below 1 (where it is no traced array).
    """
    B = q.shape[0]
    return {
        "chunk_len_B": _per_row("chunk_len", chunk_len, B, jnp.int32, at_least=1),
        "window_B": _per_row("window", window, B, jnp.int32, at_least=1),
        "scale_B": _per_row("scale", q.shape[-1] ** -0.5 if scale is None else scale, B, jnp.float32),
    }


def _per_row(name, value, B, dtype, at_least=None):
    """A number or [B] array as [B] in `dtype`; None stays None. The values of a traced array cannot be checked."""
    if value is None:
        return None
    if at_least is not None and not isinstance(value, jax.core.Tracer) and np.any(np.asarray(value) < at_least):
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    value = jnp.asarray(value, dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape != (B,)):
        raise ValueError(f"{name} must be one number or one per row of the batch ({B}), got shape {value.shape}")
    return jnp.broadcast_to(value, (B,))


def last_queries(B, T, S, *, window=None, chunk_len=None, positions_BT=None) -> Masks:
    """Masks whose work is counted: keys at positions 0..S-1; queries the last T of them, or at positions_BT if given.

    One segment, a scale of 1; window and chunk_len are numbers or None.
    """
    at_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    at_BT = at_BS[:, S - T :] if positions_BT is None else jnp.asarray(positions_BT, jnp.int32)
    window_B, chunk_len_B = (None if x is None else jnp.full(B, x, jnp.int32) for x in (window, chunk_len))
    return Masks(Tokens(at_BT, None), Tokens(at_BS, None), window_B, chunk_len_B, jnp.ones(B))
