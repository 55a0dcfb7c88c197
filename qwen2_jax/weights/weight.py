# SPDX-License-Identifier: Apache-2.0
"""The one protocol for weights, in whatever form they are stored.

A weight is [*out, *in], behind a dimension of layers where several are stacked. It is an array (plain.py) or a
`StoredWeight`: int8.py, int4_groups.py, adapted.py. The model calls `matmul` and `take`; no other file asks which form
a weight has. A new form is one new file, a subclass of StoredWeight whose arrays are its pytree leaves, registered with
jax.tree_util.register_dataclass, and an entry in forms.py.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwen2_jax.weights import plain
from qwen2_jax.weights.params import ParamSpec, Tree


class StoredWeight(abc.ABC):
    """A weight in another form than one array. Its parts are pytree leaves, so it passes through jit, scan and devices.

    All parts of a stacked weight begin with the dimension of layers: w[layer] slices each of them.
    """

    form: ClassVar[str]  # for messages: "int8"

    def __getitem__(self, index) -> Self:
        return jax.tree.map(lambda part: part[index], self)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for, [*out, *in]."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array, contract: int, dtype) -> jax.Array:
        """See the function `matmul`."""

    @abc.abstractmethod
    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See the function `take`."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """The weight as one array, float32 where the form does not say otherwise."""

    @abc.abstractmethod
    def shardings(self, where: Sharding) -> Self:
        """Where each part belongs if the whole weight is laid out as `where` says; see `part_sharding`."""

    @abc.abstractmethod
    def along(self, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> Self:
        """See the function `along`."""

    def convert(self, to: Callable[[jax.Array, ParamSpec], "Weight"], spec: ParamSpec) -> "Weight":
        """See the function `convert`."""
        return to(self.dequantize(), spec)

    def fitted(self, where: Sharding) -> Self:
        """See the function `fitted`."""
        return self

    def of_experts(self) -> "Experts":
        """See the function `of_experts`."""
        return self.dequantize(), None, None


Weight = jax.Array | StoredWeight
# values [E, O, I]; then of integers float32 factors [E, O], or factors and perhaps offsets of groups [E, O, G]
Experts = tuple[jax.Array, jax.Array | None, jax.Array | None]


def matmul(x: jax.Array, w: Weight, *, contract: int = 1, dtype=None) -> jax.Array:
    """x [..., *in] times w [*out, *in], summed over the last `contract` dimensions of both: [..., *out].

    Accumulates in float32 and returns `dtype`, by default x's.
    """
    dtype = dtype or x.dtype
    return w.matmul(x, contract, dtype) if isinstance(w, StoredWeight) else plain.matmul(x, w, contract, dtype)


def take(table_VD: Weight, ids: jax.Array, dtype) -> jax.Array:
    """Rows of an embedding, [..., D]; `dtype` is that of forms which widen. On a mesh the table does not move."""
    return table_VD.take(ids, dtype) if isinstance(table_VD, StoredWeight) else plain.take(table_VD, ids, dtype)


def of_experts(w_EOI: Weight) -> Experts:
    """Matrices of routed experts as ops.experts takes them: (values, factors or None, offsets or None)."""
    return w_EOI.of_experts() if isinstance(w_EOI, StoredWeight) else (w_EOI, None, None)


def dequantize(w: Weight) -> jax.Array:
    """The weight as one array: an array is returned as it is."""
    return w.dequantize() if isinstance(w, StoredWeight) else w


def along(w: Weight, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> Weight:
    """The weight with `change` applied along one of its dimensions, which `change` gets as an array's first.

    spec: the weight's declaration. change: picks, repeats or pads with zeros along that dimension alone.
    """
    return w.along(spec, axis, change) if isinstance(w, StoredWeight) else plain.along(w, axis, change)


def shardings(w: Weight, where: Sharding) -> Any:
    """A Sharding for each part of the weight (the weight's form, of shardings), for jax.device_put and shapes."""
    return w.shardings(where) if isinstance(w, StoredWeight) else where


def fitted(w: Weight, where: Sharding) -> Weight:
    """The same weight, with parts that can be divided as `where` divides the weight."""
    return w.fitted(where) if isinstance(w, StoredWeight) else w


def part_bytes(part: Any) -> int:
    """Bytes on a device of an array, or of its shape and dtype: two numbers of int4 share a byte."""
    bits = 4 if part.dtype == jnp.int4 else 8 * part.dtype.itemsize
    return -(-math.prod(part.shape) * bits // 8)


def part_sharding(where: Sharding, dims: Sequence[int | None]) -> Sharding:
    """For a part of a weight whose layout is `where`: dims gives, for each dimension of the part, that of the weight
    with which it is divided, or None for a dimension that is not divided."""
    if not isinstance(where, NamedSharding):
        return where
    axes = [*where.spec, *[None] * len(dims)]
    return NamedSharding(where.mesh, PartitionSpec(*(None if dim is None else axes[dim] for dim in dims)))


def put(params: Any, where: Any) -> Any:
    """The parameters as `where` says, a tree of one Sharding per weight; what lies there already is not copied."""

    def one(w: Weight, to: Sharding) -> Weight:
        w = fitted(w, to)
        return jax.device_put(w, shardings(w, to))

    return jax.tree.map(one, params, where, is_leaf=_is_stored)


def stored_forms(params: Any) -> tuple[str, ...]:
    """Names of the forms, other than arrays, that a weight or a tree of weights contains, sorted."""
    return tuple(sorted({leaf.form for leaf in jax.tree.leaves(params, is_leaf=_is_stored) if _is_stored(leaf)}))


def convert(params: Tree, specs: Tree, to: Callable[[jax.Array, ParamSpec], Weight]) -> Tree:
    """The parameters with every weight matrix in another form; norms, biases and routers stay arrays.

    Empties `params` array by array, so that the two never need the memory of both. The base of an adapted weight is
    converted, its correction is not.
    """
    converted: Tree = {}
    for name in list(params):
        leaf, spec = params.pop(name), specs[name]
        if isinstance(leaf, dict):
            converted[name] = convert(leaf, spec, to)
        else:
            converted[name] = convert_one(leaf, spec, to) if is_matrix(spec) else leaf
    return converted


def convert_one(w: Weight, spec: ParamSpec, to: Callable[[jax.Array, ParamSpec], Weight]) -> Weight:
    """One weight matrix in another form; see `convert`."""
    return w.convert(to, spec) if isinstance(w, StoredWeight) else to(w, spec)


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter is a weight matrix, or one for each expert, so that it may be stored in any form.

    A router [experts, embed] is none: its rounding would change which experts are chosen.
    """
    dims = [axis for axis in spec.axes if axis not in ("layers", "experts")]
    return spec.decay and len(dims) >= 2


def summed(spec: ParamSpec) -> int:
    """How many of a matrix's last dimensions `matmul` sums over."""
    return 2 if spec.axes[-2:] == ("heads", "head_dim") else 1


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, StoredWeight)
