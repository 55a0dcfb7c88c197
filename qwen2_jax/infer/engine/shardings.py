# SPDX-License-Identifier: Apache-2.0
"""The shardings of generation's arrays: on one device, or on a mesh where ops divides its work."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.infer.engine.pages import PAGE
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.params import Tree


class Programs(NamedTuple):
    """The compiled functions for one shape of cache: see Generator._prefill_chunk, _score_chunk and _decode_steps."""

    prefill: Any
    score: Any
    decode: Any


@dataclasses.dataclass(frozen=True)
class Shardings:
    """mesh: None for one device. replicated: the sharding of small arrays, of which every device has a copy."""

    mesh: jax.sharding.Mesh | None
    replicated: jax.sharding.Sharding

    @classmethod
    def of(cls, params: Tree, mesh: jax.sharding.Mesh | None) -> "Shardings":
        """Those for a model with these parameters. mesh: None takes the mesh that the parameters are on."""
        where: Any = jax.tree.leaves(params)[0].sharding
        if mesh is None and isinstance(where, jax.sharding.NamedSharding):
            mesh = cast(jax.sharding.Mesh, where.mesh)
        if mesh is None:
            return cls(None, jax.sharding.SingleDeviceSharding(next(iter(where.device_set))))
        return cls(mesh, sharding.sharding((), (), mesh))

    def traced(self, function: Callable) -> Callable:
        """`function`, traced with the mesh and the rules of serving."""
        return sharding.on(self.mesh, function, sharding.SERVING)

    def cache(self, config: ModelConfig, rows: int, length: int) -> jax.sharding.Sharding:
        """The sharding of keys, values and their scales: rows, heads and slots are divided where the mesh divides them
        evenly."""
        if self.mesh is None:
            return self.replicated
        return sharding.fitting(ops.CACHE[:-1], (1, rows, config.num_key_value_heads, length), self.mesh)

    def pages(self, config: ModelConfig, pages: int) -> jax.sharding.Sharding:
        """The sharding of a paged cache: by heads, where the mesh divides them evenly."""
        if self.mesh is None:
            return self.replicated
        return sharding.fitting(ops.PAGES[:-1], (1, pages, config.num_key_value_heads, PAGE), self.mesh)
