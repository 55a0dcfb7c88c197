# SPDX-License-Identifier: Apache-2.0
"""Numbers of heads that the tensor axis does not divide: the same model with key heads repeated and query heads padded.

With 28 query and 4 key heads on tensor=8, each key head has two copies, each for half of its 7 query heads:

    keys     0  0 | 1  1 | 2  2 | 3  3                      8 heads, one per device
    queries  0 1 2 3 | 4 5 6 . | 7 8 9 10 | 11 12 13 . ...  32 heads, four per device; "." has no weights

The wider model is an ordinary ModelConfig. A padding head adds nothing (its rows of the output projection are zero), so
the result is that of the original model. Parameters, optimizer state and checkpoints keep the original heads: training
widens the copy that a step computes with, generation the loaded weights.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.params import ParamSpec, Tree
from qwen2_jax.weights.weight import Weight, along

# N query heads  K key heads  G = N / K queries of a key head


@dataclasses.dataclass(frozen=True)
class Heads:
    """Maps a model's heads to those of the wider model and back.

    config: of the wider model. keys, group: K and G of the original model. copies: number of copies of each key head;
    each serves `share` of its query heads, the last perhaps fewer. Key heads from keys * copies on are padding.
    """

    config: ModelConfig
    keys: int
    group: int
    copies: int
    share: int

    def widen(self, params: Tree, specs: Tree) -> Tree:
        """The wider model's parameters; to be called inside jit. specs: declarations of `params`. Differentiable."""
        return self._each(params, specs, self._wider_queries, self._wider_keys)

    def narrow(self, params: Tree, specs: Tree) -> Tree:
        """The model's parameters from the wider one's: undoes `widen`. specs: declarations of the result."""
        return self._each(params, specs, self._own_queries, self._own_keys)

    def changes(self, spec: ParamSpec) -> bool:
        """Whether a declared weight has heads."""
        return "heads" in spec.axes or "kv_heads" in spec.axes

    def _each(self, params: Tree, specs: Tree, queries: Callable, keys: Callable) -> Tree:
        def one(spec: ParamSpec, w: Weight) -> Weight:
            for name, change in (("heads", queries), ("kv_heads", keys)):
                if name in spec.axes:
                    return along(w, spec, spec.axes.index(name), change)
            return w

        return jax.tree.map(one, specs, params, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))

    def _wider_queries(self, x: jax.Array) -> jax.Array:
        """[N, ...] -> [N of the wider model, ...]."""
        x = x.reshape(self.keys, self.group, *x.shape[1:])
        x = _padded(x, 1, self.copies * self.share)
        x = x.reshape(-1, *x.shape[2:])
        return _split("heads", _padded(x, 0, self.config.num_attention_heads))

    def _wider_keys(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, self.copies, axis=0)
        return _split("kv_heads", _padded(x, 0, self.config.num_key_value_heads))

    def _own_queries(self, x: jax.Array) -> jax.Array:
        x = x[: self.keys * self.copies * self.share].reshape(self.keys, -1, *x.shape[1:])
        return x[:, : self.group].reshape(-1, *x.shape[2:])

    def _own_keys(self, x: jax.Array) -> jax.Array:
        return x[: self.keys * self.copies : self.copies]


def spread(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> Heads | None:
    """The wider model for the mesh's tensor axis; None where it divides the model's key heads.

    Key heads are repeated or padded until it does, whichever gives fewer query heads.
    """
    parts = 1 if mesh is None else sharding.parts(sharding.axes_of("kv_heads", mesh), mesh)
    K, G = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    if K % parts == 0:
        return None

    def wider(copies: int) -> tuple[int, int]:
        """(query heads, key heads)."""
        keys = math.ceil(K * copies / parts) * parts
        return keys * math.ceil(G / copies), keys

    copies = min((1, math.lcm(K, parts) // K), key=wider)
    queries, keys = wider(copies)
    changed = dataclasses.replace(
        config, num_attention_heads=queries, num_key_value_heads=keys, head_dim=config.head_dim
    )
    return Heads(changed, K, G, copies, math.ceil(G / copies))


def place(params: Tree, specs: Tree, heads: Heads, mesh: Mesh) -> Tree:
    """The wider model's parameters on a mesh. Removes each weight from `params` as it goes, so
    that there are never two copies of the whole model."""
    wide: Tree = {}
    for name in list(params):
        leaf, spec = params.pop(name), specs[name]
        if isinstance(leaf, dict):
            wide[name] = place(leaf, spec, heads, mesh)
        elif heads.changes(spec):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                wide[name] = _wider(leaf, dataclasses.replace(spec, hf="", layers=spec.layers[:1]), heads)
        else:
            wide[name] = leaf
    return wide


@partial(jax.jit, static_argnums=(1, 2))
def _wider(w: Weight, spec: ParamSpec, heads: Heads) -> Weight:
    """One weight; compiled once for all layers, whose declarations differ in names alone."""
    return heads.widen({"": w}, {"": spec})[""]


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x padded with zeros at the end of an axis, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _split(name: str, x: jax.Array) -> jax.Array:
    """x with its first dimension, the heads, sharded over the current mesh, if there is one.

    Otherwise XLA would keep the stored sharding, over the head width, and move the projections' outputs instead.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(sharding.axes_of(name, mesh), *free))
