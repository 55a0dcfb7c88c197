# SPDX-License-Identifier: Apache-2.0
"""Where the arrays of generation live: on one device, or on a mesh where ops divides its work."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.params import Tree


class Programs(NamedTuple):
    """What is compiled for one shape of cache: see Generator._prefill_chunk, _score_chunk and _decode_steps."""

    prefill: Any
    score: Any
    decode: Any


@dataclasses.dataclass(frozen=True)
class Places:
    """mesh: None for one device. everywhere: of the small arrays, which every device has."""

    mesh: jax.sharding.Mesh | None
    everywhere: jax.sharding.Sharding

    @classmethod
    def of(cls, params: Tree, mesh: jax.sharding.Mesh | None) -> "Places":
        """Of a model whose parameters are where they are, or, if given, on this mesh."""
        where: Any = jax.tree.leaves(params)[0].sharding
        if mesh is None and isinstance(where, jax.sharding.NamedSharding):
            mesh = cast(jax.sharding.Mesh, where.mesh)
        if mesh is None:
            return cls(None, jax.sharding.SingleDeviceSharding(next(iter(where.device_set))))
        return cls(mesh, sharding.sharding((), (), mesh))

    def on(self, function: Callable) -> Callable:
        """`function`, traced for the mesh."""
        return sharding.on(self.mesh, function, sharding.SERVING)

    def cache(self, config: ModelConfig, rows: int, length: int) -> jax.sharding.Sharding:
        """Of keys and values: rows, heads and slots are divided as far as they can be. They never move."""
        if self.mesh is None:
            return self.everywhere
        shape = (1, rows, config.num_key_value_heads, length, config.head_dim)
        return sharding.fitting(ops.CACHE, shape, self.mesh)
