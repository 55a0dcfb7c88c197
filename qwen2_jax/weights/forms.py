# SPDX-License-Identifier: Apache-2.0
"""The table of forms in which weight matrices can be kept in memory, by the name that `dtype` has for them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen2_jax.weights import weight
from qwen2_jax.weights.int4_groups import to_int4
from qwen2_jax.weights.int8 import to_int8
from qwen2_jax.weights.params import ParamSpec, Tree, is_spec
from qwen2_jax.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Form:
    """round: a weight matrix in this form. keeps_groups: a quantised file's own groups are kept, and not rounded.

    only_layers: embedding and LM head stay arrays, as training wants them, whose loss uses them directly.
    """

    round: Callable[[jax.Array, ParamSpec], Weight]
    keeps_groups: bool = False
    only_layers: bool = False

    def serves(self, spec: ParamSpec) -> bool:
        """Whether a parameter is kept in this form."""
        return weight.is_matrix(spec) and (bool(spec.layers) or not self.only_layers)

    def convert(self, array: jax.Array, spec: ParamSpec, where: jax.sharding.Sharding) -> Weight:
        """One parameter of a model as this form keeps it, laid out as `where`; an array where it does not serve."""
        return weight.put(self.round(array, spec), where) if self.serves(spec) else array

    def shape(self, shape: jax.ShapeDtypeStruct, spec: ParamSpec) -> Weight | jax.ShapeDtypeStruct:
        """As `convert`, for shapes with shardings and no arrays."""
        if not self.serves(spec):
            return shape
        whole = jax.ShapeDtypeStruct(shape.shape, shape.dtype)
        parts = jax.eval_shape(lambda w: weight.fitted(self.round(w, spec), shape.sharding), whole)
        place = lambda part, where: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(place, parts, weight.shardings(parts, shape.sharding))


FORMS = {"int8": Form(to_int8), "int4": Form(to_int4, keeps_groups=True)}
FORM_DTYPE = "bfloat16"  # of everything that is no matrix, and of activations, where a form is asked for as dtype


def array_dtype(dtype: str) -> str:
    """The dtype of arrays for a value of `dtype` that may name a form."""
    return FORM_DTYPE if dtype in FORMS else dtype


def form_of(dtype: str, *, only_layers: bool = False) -> Form | None:
    """The form that a value of `dtype` names; None for a dtype of arrays."""
    form = FORMS.get(dtype)
    return form and dataclasses.replace(form, only_layers=only_layers)


def nbytes(specs: Tree, dtype: str) -> int:
    """Bytes of declared parameters when kept as `dtype` says, a dtype of arrays or the name of a form."""
    of_arrays, form = jnp.dtype(array_dtype(dtype)), FORMS.get(dtype)

    def one(spec: ParamSpec) -> int:
        shape = jax.ShapeDtypeStruct(spec.shape, of_arrays)
        if form is not None and weight.is_matrix(spec):
            shape = jax.eval_shape(lambda w: form.round(w, spec), shape)
        return sum(weight.part_bytes(part) for part in jax.tree.leaves(shape))

    return sum(map(one, jax.tree.leaves(specs, is_leaf=is_spec)))
