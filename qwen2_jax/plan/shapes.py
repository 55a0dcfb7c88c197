# SPDX-License-Identifier: Apache-2.0
"""Parameters as jax.ShapeDtypeStruct with shardings, from the model's declarations; a plan has no arrays."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax.parallel import sharding
from qwen2_jax.train.step import shardings_of
from qwen2_jax.weights.int8 import to_int8
from qwen2_jax.weights.params import ParamSpec, Tree
from qwen2_jax.weights.weight import is_matrix, shardings


def shapes(specs: Tree, mesh: Mesh, dtype: Any, rules: Mapping = sharding.RULES) -> Tree:
    """jax.ShapeDtypeStruct of every declared parameter, all of one dtype, with its sharding on the mesh."""
    place = lambda spec, where: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, specs, shardings_of(specs, mesh, rules), is_leaf=is_spec)


def int8_shapes(specs: Tree, mesh: Mesh, dtype: Any, rules: Mapping = sharding.RULES) -> Tree:
    """As `shapes`, with every matrix that int8.quantize rounds in the form of an Int8."""

    def rounded(spec: ParamSpec, shape: jax.ShapeDtypeStruct):
        if not is_matrix(spec):
            return shape
        parts = jax.eval_shape(partial(to_int8, spec=spec), shape)
        place = lambda part, where: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(place, parts, shardings(parts, shape.sharding))

    return jax.tree.map(rounded, specs, shapes(specs, mesh, dtype, rules), is_leaf=is_spec)


def is_spec(leaf: Any) -> bool:
    """Whether a leaf is a declaration; jax.tree.map would look inside."""
    return isinstance(leaf, ParamSpec)
