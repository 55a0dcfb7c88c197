# SPDX-License-Identifier: Apache-2.0
"""The two layouts of a cache of keys and values, what fits them, and keeping them in eight bits.

B batch, S slots of a row, K kv heads, H head width; a paged cache has pages of Y slots, P of them to a row (S = P * Y).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..masks import Masks


class Cache(NamedTuple):
    """Keys and values by slots, in one of the two layouts; what decode_attention reads: a pytree."""

    k: Any  # an array, or its shape and dtype where work is counted. Dense: [B, K, S, H]; paged: [pages, K, Y, H]
    v: Any
    block_table_BP: Any = None  # int32: the pages of each row; None: dense
    k_scale: Any = None  # float32, k's shape without H: of an int8 cache, otherwise None
    v_scale: Any = None
    first: Any = 0  # int32 scalar: the position of slot 0

    @property
    def slots(self) -> int:
        """S: how many slots a row of the batch has."""
        length = self.k.shape[2]
        return length if self.block_table_BP is None else self.block_table_BP.shape[1] * length

    @property
    def pages_BP(self) -> jax.Array:
        """The block table of a paged cache with valid page numbers only: entries of unused pages may hold anything."""
        assert self.block_table_BP is not None
        return jnp.clip(self.block_table_BP, 0, self.k.shape[0] - 1)

    def slots_of(self, masks: Masks):
        """The slot of each query's own position, int [B, T]; -1 where nothing is visible; may be beyond the cache.

        In slots, causality, padding and windows are the same comparisons as in positions; chunks are not.
        """
        return jnp.maximum(masks.q.positions - self.first, -1)


def quantize_cache(x_BKSH):
    """(int8 values, float32 scale [B, K, S]) with x = value * scale: symmetric, one scale per token and head.

    Serves a paged cache [pages, K, Y, H] too. A token of zeros gets scale 0.
    """
    wide = x_BKSH.astype(jnp.float32)
    scale_BKS = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale_BKS == 0, 1, scale_BKS)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale_BKS


def check_inputs(queries, cache: Cache, q_positions_BT):
    """Raises ValueError unless the arrays fit together; `queries` maps argument names to [B, T, N, H] arrays."""
    k, v, block_table_BP, k_scale, v_scale, _ = cache
    (first, q), *others = queries.items()
    dense = block_table_BP is None
    layout = "[B, K, S, H]" if dense else "[pages, K, page length, H]"
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{first} must be [B, T, N, H] and k {layout}, got {q.shape} and {k.shape}")
    B, T, N, H = q.shape
    rows, K, slots, _ = k.shape
    if K == 0 or N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: N must be a multiple of K")
    expected: dict[str, Any] = {name: (x, (B, T, N, H)) for name, x in others}
    expected |= {
        "k": (k, (B if dense else rows, K, slots, H)),
        "v": (v, k.shape),
        "q_positions_BT": (q_positions_BT, (B, T)),
    }
    expected |= {"k_scale": (k_scale, k.shape[:3]), "v_scale": (v_scale, k.shape[:3])}
    if not dense:
        if block_table_BP.ndim != 2 or not jnp.issubdtype(block_table_BP.dtype, jnp.integer):
            raise ValueError(
                f"block_table_BP must be integers [B, pages per row], got {block_table_BP.dtype} {block_table_BP.shape}"
            )
        expected |= {"block_table_BP": (block_table_BP, (B, block_table_BP.shape[1]))}
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit {first} {q.shape} and k {layout} {k.shape}, got {x.shape}")
    if k.size == 0 or (not dense and block_table_BP.shape[1] == 0):
        raise ValueError(f"k {layout} must have at least one slot per row, got {k.shape}")
    if k.dtype != v.dtype:
        raise ValueError(f"v must have the dtype of k, {k.dtype}, got {v.dtype}")
    for name, x in {"k_scale": k_scale, "v_scale": v_scale}.items():
        if (x is None) == (k.dtype == jnp.int8):
            raise ValueError(
                f"{name} must be given exactly where k and v are int8: it is {'missing' if x is None else 'given'} "
                f"and k is {k.dtype}"
            )
        if x is not None and x.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32, got {x.dtype}")


def first_position(first):
    """The position of slot 0 as an int32 scalar. Raises ValueError where it is none, or below 0."""
    if jnp.shape(first) != () or not jnp.issubdtype(jnp.result_type(first), jnp.integer):
        raise ValueError(f"first must be one integer, got {jnp.result_type(first)} {jnp.shape(first)}")
    if not isinstance(first, jax.core.Tracer) and np.asarray(first) < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    return jnp.asarray(first, jnp.int32)
