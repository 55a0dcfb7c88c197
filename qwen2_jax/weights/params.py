# SPDX-License-Identifier: Apache-2.0
"""Declaring parameters: shape, names of the dimensions, initial value and name in a Hugging Face file, in one place.

Initialisation, sharding, checkpoint conversion, weight decay and the memory plan all read these declarations.
Arrays keep the row-major order of the file ([out, in]), so converting is reshaping and never transposing.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Tree = dict[Any, Any]  # nested dict of parameters, keys are str or int


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter, without its values.

    shape, dtype: of our array, with a leading dimension of len(layers) where the parameter belongs to layers.
    axes: logical name of each dimension, see sharding.RULES.
    hf: name in a Hugging Face file; relative to "model.layers.{layer}." if layers is not empty; holds "{e}" if each
        expert is a tensor of its own.
    hf_shape: shape of one such tensor.
    layers: indices of the model's layers stacked in the leading dimension; () for parameters outside layers.
    decay: whether weight decay applies (matrices yes; norms and biases no).
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    hf: str
    hf_shape: tuple[int, ...]
    layers: tuple[int, ...]
    decay: bool


class Declare:
    """Makes nnx.Params for the layers `layers`, stacked; or single ones when `layers` is empty.

    Values depend on the seed, the parameter's name and the layer's index alone, so that a stacked and an unrolled
    model of one seed are equal.
    """

    def __init__(self, key: jax.Array, *, dtype, std: float, layers: tuple[int, ...] = ()):
        self.key, self.dtype, self.std, self.layers = key, dtype, std, layers

    def __call__(
        self,
        *dims: tuple[str, int],
        hf: str,
        hf_shape: tuple[int, ...] = (),
        init: str = "normal",
        std: float | None = None,
    ) -> nnx.Param:
        """dims: (logical name, size) per dimension. init: "normal", "ones" or "zeros". std: default the config's."""
        std = self.std if std is None else std
        axes, shape = zip(*dims, strict=True)
        key = jax.random.fold_in(self.key, zlib.crc32(hf.encode()))

        def value(layer):
            if init == "normal":
                draw = jax.random.normal(jax.random.fold_in(key, layer), shape, jnp.float32) * std
                return draw.astype(self.dtype)
            return jnp.full(shape, {"ones": 1, "zeros": 0}[init], self.dtype)

        values = jax.vmap(value)(jnp.asarray(self.layers)) if self.layers else value(0)
        return nnx.Param(
            values,
            axes=("layers", *axes) if self.layers else axes,
            hf=hf,
            hf_shape=hf_shape or shape,
            layers=self.layers,
            decay=init == "normal",
        )


def specs(abstract_model: nnx.Module) -> Tree:
    """The declarations of a model as a nested dict of ParamSpec, in the shape of its parameters."""
    tree: Tree = {}
    for path, param in nnx.to_flat_state(nnx.state(abstract_model, nnx.Param)):
        meta, value = param.get_metadata(), param.get_value()
        *parents, last = path
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        known = {name: meta[name] for name in ("axes", "hf", "hf_shape", "layers", "decay")}
        node[last] = ParamSpec(shape=tuple(value.shape), dtype=value.dtype, **known)
    return tree


def leaves(tree: Tree, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, leaf) of a nested dict of parameters or ParamSpecs, in a fixed order."""
    for name in sorted(tree, key=str):
        here = (*path, name)
        if isinstance(tree[name], dict):
            yield from leaves(tree[name], here)
        else:
            yield here, tree[name]


def is_spec(leaf: Any) -> bool:
    """Whether a leaf is a declaration; jax.tree.map would look inside."""
    return isinstance(leaf, ParamSpec)


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or ParamSpecs."""
    return sum(math.prod(leaf.shape) for _, leaf in leaves(tree))
