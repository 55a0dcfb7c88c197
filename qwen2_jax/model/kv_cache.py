# SPDX-License-Identifier: Apache-2.0
"""The key/value cache of decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig

# B batch  T new tokens  S slots  K kv heads  H head width  R repeats of a stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of the layers that are scanned together, each [R, B, K, S, H].

    The slot of a token is its position in its row. Keys are stored rotated and unscaled. It takes 2 * K * H * itemsize
    bytes per token and layer. Heads come before slots, so that a decode step reads each head's keys contiguously.
    """

    k: jax.Array
    v: jax.Array

    def write(self, repeat, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """The cache with new tokens of layer `repeat` in the slots of their positions.

        Tokens whose position is negative (padding) or S and above are dropped.
        """
        written = ops.write_cache((self.k, self.v), repeat, (k_BTKH, v_BTKH), positions_BT)
        # Without the barrier XLA may fuse the write into its readers too, and then keeps the old cache by copying it.
        return LayerCache(*jax.lax.optimization_barrier(written))


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
            shape = (repeats, batch, config.num_key_value_heads, length, config.head_dim)
            return LayerCache(*(jnp.zeros(shape, dtype, device=place) for _ in range(2)))

        return cls(tuple(tuple(layer(stack.repeats) for _ in stack.kinds) for stack in config.stacks(unroll)))

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.layers[0][0].k.shape[3]
