# SPDX-License-Identifier: Apache-2.0
"""The key/value cache of decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen2_jax import ops
from qwen2_jax.config.model_config import DTYPES, ModelConfig

# B batch  T new tokens  S slots  K kv heads  D model width  H head width  f frequencies  R repeats of a stack

CACHE_DTYPES = (*DTYPES, "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of the layers that are scanned together, each [R, B, K, S, H].

    The slot of a token is its position in its row. Keys are stored rotated and unscaled. It takes 2 * K * H * itemsize
    bytes per token and layer. Heads come before slots, so that a decode step reads each head's keys contiguously.
    A paged cache is the same with pages of S slots in place of rows; ops.PageLayout says whose they are.

    k_scale, v_scale: float32 [R, B, K, S], the scale of each token and head where the cache is int8, else None. Its
    keys are divided by `balance` first, and the queries multiplied by it.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def zeros(cls, config: ModelConfig, repeats: int, batch: int, length: int, dtype, place=None) -> "LayerCache":
        """An empty cache of `repeats` layers; dtype: int8 or one of floats. place: the sharding of each array."""
        shape = (repeats, batch, config.num_key_value_heads, length, config.head_dim)
        numbers = [jnp.zeros(shape, dtype, device=place) for _ in range(2)]
        scales = [jnp.zeros(shape[:-1], jnp.float32, device=place) for _ in range(2)] if dtype == jnp.int8 else []
        return cls(*numbers, *scales)

    @property
    def scales(self) -> tuple[jax.Array, ...]:
        """k_scale and v_scale of an int8 cache; of others nothing."""
        return () if self.k_scale is None or self.v_scale is None else (self.k_scale, self.v_scale)

    def write(
        self, repeat, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, pages: ops.PageLayout | None = None
    ) -> "LayerCache":
        """The cache with new tokens of layer `repeat` in the slots of their positions, or where `pages` says.

        Tokens whose position is negative (padding) or S and above are dropped.
        """
        caches, new = (self.k, self.v, *self.scales), (k_BTKH, v_BTKH)
        if pages is None:
            written = ops.write_cache(caches, repeat, new, positions_BT)
        else:
            written = ops.write_pages(caches, repeat, new, pages)
        # Without the barrier XLA may fuse the write into its readers too, and then keeps the old cache by copying it.
        return LayerCache(*jax.lax.optimization_barrier(written))

    def attend(self, queries, repeat, positions_BT: jax.Array, pages: ops.PageLayout | None, **how) -> jax.Array:
        """Attention of new tokens over layer `repeat`, [B, T, N, H]; `how` as in ops.cached_attention."""
        if pages is None:
            return ops.cached_attention(
                queries, self.k, self.v, repeat, q_positions_BT=positions_BT, scales=self.scales, **how
            )
        caches = (self.k, self.v, *self.scales)
        return ops.paged_attention(queries, caches, repeat, pages=pages, q_positions_M1=positions_BT, **how)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One LayerCache per position in a stack's period, in the order of the model's stacks and blocks."""

    layers: tuple[tuple[LayerCache, ...], ...]

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype=jnp.float32,
        *,
        unroll: bool = False,
        place: jax.sharding.Sharding | None = None,
    ) -> "Cache":
        """An empty cache for `batch` rows of at most `length` tokens; `unroll` as the model was built. place: the
        sharding of each array, which is created with it."""

        def layer(repeats: int) -> LayerCache:
            return LayerCache.zeros(config, repeats, batch, length, jnp.dtype(dtype), place)

        return cls(tuple(tuple(layer(stack.repeats) for _ in stack.kinds) for stack in config.stacks(unroll)))

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.layers[0][0].k.shape[3]


def balance(w_KHD: jax.Array, bias_KH: jax.Array) -> jax.Array:
    """float32 [K, H], equal for the two channels that rotate together: what keys of an int8 cache are divided by.

    The bias of a few key channels is twenty times the others', at every token, and would set the step that all of them
    are rounded in. Divided by about their size, the bias and four standard deviations of what the weights add to it for
    inputs of unit variance, channels are alike; queries that are multiplied by it give the same products.
    """
    variance_KH, square_KH = jnp.sum(w_KHD.astype(jnp.float32) ** 2, axis=-1), bias_KH.astype(jnp.float32) ** 2

    def of_pair(x_KH):
        first_Kf, second_Kf = jnp.split(x_KH, 2, axis=-1)
        mean_Kf = (first_Kf + second_Kf) / 2
        return jnp.sqrt(jnp.concatenate([mean_Kf, mean_Kf], axis=-1))

    size_KH = of_pair(square_KH) + 4 * of_pair(variance_KH)
    return jnp.where(size_KH > 0, size_KH, 1)
