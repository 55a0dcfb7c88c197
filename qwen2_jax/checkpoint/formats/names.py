# SPDX-License-Identifier: Apache-2.0
"""The one table between Hugging Face's tensors and our parameters, read from the declarations, used in both directions.

A tensor of a file is a slice of one parameter, in the same row-major order: reading and writing reshape and never
transpose. Orbax folders hold the parameters of the unrolled model, one array per layer, which are the same bytes again.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from qwen2_jax.weights.params import ParamSpec, Tree, leaves

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a Hugging Face folder lives: params[path][repeat][expert], reshaped to `shape`.

    repeat and expert are None where the parameter has no such dimension. leaf: path of the bytes in an Orbax folder.
    """

    path: tuple
    repeat: int | None
    expert: int | None
    shape: tuple[int, ...]
    leaf: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an Orbax folder: `names` are the file's tensors in it, in order (several only for experts)."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]


def hf_names(spec: ParamSpec, repeat: int | None) -> list[str]:
    """The file's names of one layer's share of a parameter: one, or one per expert."""
    prefix = "" if repeat is None else f"model.layers.{spec.layers[repeat]}."
    if "{e}" not in spec.hf:
        return [prefix + spec.hf]
    experts = spec.shape[0 if repeat is None else 1]
    return [prefix + spec.hf.replace("{e}", str(e)) for e in range(experts)]


def table(specs: Tree) -> dict[str, Slot]:
    """Every tensor name a Hugging Face folder of this model holds, in reading order: embedding, layers, norm, head."""
    rows = []
    for path, spec in leaves(specs):
        for repeat in range(len(spec.layers)) if spec.layers else (None,):
            names = hf_names(spec, repeat)
            share = math.prod(spec.shape) // (len(spec.layers) or 1)
            if share != len(names) * math.prod(spec.hf_shape):
                raise ValueError(f"{spec.hf}: {len(names)} tensors of {spec.hf_shape} do not fill {spec.shape}")
            layer = None if repeat is None else spec.layers[repeat]
            leaf = leaf_path(path, layer)
            order = 1 + layer if layer is not None else 0 if names[0] == EMBEDDING else math.inf
            for e, name in enumerate(names):
                expert = e if "{e}" in spec.hf else None
                rows.append((order, name, Slot(path, repeat, expert, spec.hf_shape, leaf)))
    rows.sort(key=lambda row: row[0])  # stable: within a layer, the order of the declarations
    return {name: slot for _, name, slot in rows}


def leaf_path(path: tuple, layer: int | None) -> tuple[str, ...]:
    """Path in an Orbax folder of the parameter at `path`, or of its share for one layer: that of the unrolled model."""
    return tuple(map(str, path)) if layer is None else ("stacks", str(layer), "blocks", "0", *map(str, path[4:]))


def orbax_leaves(specs: Tree) -> list[Leaf]:
    """The arrays of an Orbax folder of this model, in the order of `table`."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    names: dict[tuple[str, ...], list[str]] = {}
    for name, slot in table(specs).items():
        spec = get(specs, slot.path)
        shapes[slot.leaf] = (1, *spec.shape[1:]) if slot.repeat is not None else spec.shape
        names.setdefault(slot.leaf, []).append(name)
    return [Leaf(path, shapes[path], tuple(names[path])) for path in names]


def unrolled(specs: Tree) -> Tree:
    """The declarations of the model with unroll=True from those of the stacked one: each layer a stack of its own."""
    out: Tree = {}
    for path, spec in leaves(specs):
        if not spec.layers:
            put(out, path, spec)
        for layer in spec.layers:
            one = dataclasses.replace(spec, shape=(1, *spec.shape[1:]), layers=(layer,))
            put(out, ("stacks", layer, "blocks", 0, *path[4:]), one)
    return out


def get(tree: Tree, path: Iterable):
    """tree[path[0]][path[1]]..."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Tree, path: tuple, value) -> None:
    """Sets tree[path[0]][path[1]]... and makes the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def nested(flat: Mapping[tuple, object]) -> Tree:
    """A nested dict from paths to values."""
    tree: Tree = {}
    for path, value in flat.items():
        put(tree, path, value)
    return tree
