# SPDX-License-Identifier: Apache-2.0
"""Parameters as jax.ShapeDtypeStruct with shardings, from the model's declarations; a plan has no arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.parallel import sharding
from qwen2_jax.train.step import shardings_of
from qwen2_jax.weights.forms import array_dtype, form_of
from qwen2_jax.weights.params import Tree, is_spec


def shapes(specs: Tree, mesh: Mesh, dtype: Any, rules: Mapping = sharding.RULES) -> Tree:
    """jax.ShapeDtypeStruct of every declared parameter, all of one dtype, with its sharding on the mesh."""
    place = lambda spec, where: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, specs, shardings_of(specs, mesh, rules), is_leaf=is_spec)


def form_shapes(
    specs: Tree, mesh: Mesh, dtype: str, rules: Mapping = sharding.RULES, *, only_layers: bool = False
) -> Tree:
    """As `shapes`, where dtype may also name the form of the weight matrices (weights/forms.py)."""
    arrays = shapes(specs, mesh, jnp.dtype(array_dtype(dtype)), rules)
    if (form := form_of(dtype, only_layers=only_layers)) is None:
        return arrays
    return jax.tree.map(lambda spec, shape: form.shape(shape, spec), specs, arrays, is_leaf=is_spec)
