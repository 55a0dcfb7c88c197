# SPDX-License-Identifier: Apache-2.0
"""Parameters as jax.ShapeDtypeStruct with shardings, from the model's declarations; a plan has no arrays."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.parallel import sharding
from qwen2_jax.train.step import places_of
from qwen2_jax.weights.linear import Int8, is_matrix, summed
from qwen2_jax.weights.params import ParamSpec, Tree


def shapes(specs: Tree, mesh: Mesh, dtype: Any, rules: Mapping = sharding.RULES) -> Tree:
    """jax.ShapeDtypeStruct of every declared parameter, all of one dtype, with its sharding on the mesh."""
    place = lambda spec, where: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, specs, places_of(specs, mesh, rules), is_leaf=is_spec)


def int8_shapes(specs: Tree, mesh: Mesh, dtype: Any, rules: Mapping = sharding.RULES) -> Tree:
    """As `shapes`, with every matrix that linear.quantize rounds as Int8."""

    def rounded(spec: ParamSpec, shape: jax.ShapeDtypeStruct):
        if not is_matrix(spec):
            return shape
        outs = len(spec.shape) - summed(spec)
        place = sharding.sharding(spec.axes[:outs], spec.shape[:outs], mesh, rules)
        values = jax.ShapeDtypeStruct(spec.shape, jnp.int8, sharding=shape.sharding)
        scale = jax.ShapeDtypeStruct(spec.shape[:outs], jnp.float32, sharding=place)
        return Int8(cast(Any, values), cast(Any, scale))

    return jax.tree.map(rounded, specs, shapes(specs, mesh, dtype, rules), is_leaf=is_spec)


def is_spec(leaf: Any) -> bool:
    """Whether a leaf is a declaration; jax.tree.map would look inside."""
    return isinstance(leaf, ParamSpec)
