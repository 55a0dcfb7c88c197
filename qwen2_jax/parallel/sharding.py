# SPDX-License-Identifier: Apache-2.0
"""Shardings from the names of an array's dimensions: one table of rules, one check, one mesh layout."""

import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.errors import UserError

# The axes that a mesh may have, outermost first. Devices that differ in the last ones are neighbours; those that differ
# in the first ones may be in different slices or nodes.
AXES = {
    "replica": "copies of the model in other slices of TPUs or groups of nodes, each with its rows of the batch",
    "data": "copies of the model, each with its rows of the batch",
    "fsdp": "parts of parameters and optimizer state, each with its rows of the batch",
    "expert": "parts of the experts, each with its rows of the batch",
    "context": "parts of each row's tokens, or of its cache",
    "tensor": "parts of heads, feed-forward width and vocabulary",
}

# The name of a dimension -> the mesh axes it is sharded over. An axis shards one dimension of an array: the first, in
# the array's order, whose rule names the axis and whose size it divides.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "length": ("context",),
    "slots": ("context",),
    "layers": (),
    "embed": ("fsdp", "context", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": ("tensor",),  # of stored weights, where the axis does not divide the heads; see head_padding.py
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "score": (),  # the single output of a reward model
}
# For generation, where a decode step reads all weights for a few tokens: they are sharded over fsdp alone, which is for
# models that fit no other way. A prefill gathers them, a decode step sums activations instead (step_rows).
SERVING: Mapping[str, tuple[str, ...]] = {**RULES, "embed": ("fsdp",)}


def make_mesh(**axes: int) -> Mesh:
    """A mesh of all devices of all processes with the given axes, e.g. make_mesh(fsdp=4, tensor=2); see `mesh_of`."""
    return mesh_of(jax.devices(), axes)


def mesh_of(devices: Sequence[Any], axes: Mapping[str, int]) -> Mesh:
    """A mesh of these devices, laid out as `lay_out` says.

    Raises UserError for an unknown axis, sizes whose product is not the number of devices, and axes that the devices'
    links do not allow.
    """
    if unknown := set(axes) - set(AXES):
        raise UserError(f"a mesh has no axis {', '.join(sorted(unknown))}; choose from {', '.join(AXES)}")
    sizes = math.prod(axes.values())
    if sizes != len(devices) or min(axes.values(), default=1) < 1:
        raise UserError(
            f"mesh {dict(axes)} needs {sizes} devices; {len(devices)} are here: the product must be {len(devices)}"
        )
    return lay_out(axes, devices, _islands(devices))


def filled(axes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The same axes, with a size of -1 replaced by the number of devices divided by the others' product."""
    known = math.prod(size for size in axes.values() if size > 0)
    return {axis: devices // known if size == -1 else size for axis, size in axes.items()}


def lay_out(axes: Mapping[str, int], devices: Sequence[Any], islands: int = 1) -> Mesh:
    """A mesh of devices that come as `islands` equal groups, one after the other: slices, or nodes.

    The first axes whose sizes divide the number of islands cross the slow links between them. Axes are Auto: XLA
    inserts the collectives. Raises UserError where the islands or the links inside one do not allow it.
    """
    names, sizes = tuple(axes), tuple(axes.values())
    auto = (AxisType.Auto,) * len(names)
    across, left = [], islands
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise UserError(
            f"mesh {dict(axes)} cannot be cut into {islands} slices or nodes: its first axes must multiply to {islands}"
        )
    inside = tuple(size // out for size, out in zip(sizes, across, strict=True))
    parts = []
    for island in np.array(devices).reshape(islands, -1):
        try:
            parts.append(jax.make_mesh(inside, names, axis_types=auto, devices=list(island)).devices)
        except NotImplementedError as why:
            sides = "x".join(str(max(at) + 1) for at in zip(*(device.coords for device in island), strict=True))
            raise UserError(
                f"mesh {dict(axes)} cannot be laid out on the {sides} chips of a slice: each axis must be a side of "
                "the torus, or a product of sides"
            ) from why
    grid = np.stack(parts).reshape(*across, *inside)
    order = [axis for pair in zip(range(len(names)), range(len(names), 2 * len(names)), strict=True) for axis in pair]
    return Mesh(grid.transpose(order).reshape(sizes), names, axis_types=auto)


def _islands(devices: Sequence[Any]) -> int:
    """Slices of TPUs, or nodes of GPUs, between which the links are slow."""
    if devices[0].platform == "gpu":
        return len({device.process_index for device in devices})
    return len({getattr(device, "slice_index", None) for device in devices})


_STORED: contextvars.ContextVar[Mapping[str, tuple[str, ...]]] = contextvars.ContextVar("stored", default=RULES)


def on(mesh: Mesh | None, function: Callable, rules: Mapping[str, tuple[str, ...]] = RULES) -> Callable:
    """`function`, traced with `mesh` as the mesh that qwen2_jax.ops divides its work over. None: `function` itself.

    rules: those that the parameters are sharded by.
    """
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args, **kwargs):
        token = _STORED.set(rules)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)
        finally:
            _STORED.reset(token)

    return traced


def current_rules() -> Mapping[str, tuple[str, ...]]:
    """The rules that the parameters are sharded by on current_mesh()."""
    return _STORED.get()


def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `on`; None outside of one, with one device, and inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def axes_of(name: str | None, mesh: Mesh | AbstractMesh, rules: Mapping = RULES) -> tuple[str, ...]:
    """The axes of `mesh` over which the dimension called `name` is sharded."""
    return () if name is None else tuple(a for a in rules[name] if a in mesh.axis_names)


def dividing(name: str, size: int, mesh: Mesh | AbstractMesh, rules: Mapping = RULES) -> tuple[str, ...]:
    """The axes of `name`, from the first, as many as divide a dimension of this size."""
    axes = axes_of(name, mesh, rules)
    while size % parts(axes, mesh):
        axes = axes[:-1]
    return axes


def fitting(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose dimensions are split as far as their sizes allow: how ops divides its work."""
    return NamedSharding(
        mesh,
        PartitionSpec(
            *(
                None if name is None else dividing(name, size, mesh) or None
                for name, size in zip(names, shape, strict=True)
            )
        ),
    )


def step_rows(rows: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Axes over which the rows of a decode step are sharded in products with weights: not those that weights are
    sharded over.

    A product with a weight that is sharded over fsdp then sums activations and does not move the weight. Were the rows
    sharded over fsdp too, each device would gather the whole weight at every token, for a row or two.
    """
    stored = [axis for axis in current_rules()["embed"] if axis in mesh.axis_names and mesh.shape[axis] > 1]
    return tuple(itertools.takewhile(lambda axis: axis not in stored, dividing("batch", rows, mesh)))


def parts(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a dimension is split into by axes of `mesh`."""
    return math.prod(mesh.shape[axis] for axis in axes)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Mapping = RULES
) -> PartitionSpec:
    """PartitionSpec of an array of this shape whose dimensions are called `names`; axes that `mesh` lacks are left out.

    Raises UserError, naming the sizes that divide, where an axis divides none of the dimensions that name it.
    """
    groups: list[tuple[str, ...]] = []
    for name, size in zip(names, shape, strict=True):
        group: tuple[str, ...] = ()
        for axis in axes_of(name, mesh, rules):
            if all(axis not in earlier for earlier in groups) and size % parts((*group, axis), mesh) == 0:
                group = (*group, axis)
        groups.append(group)
    for name, size, group in zip(names, shape, groups, strict=True):
        for axis in axes_of(name, mesh, rules):
            if all(axis not in taken for taken in groups) and mesh.shape[axis] > 1:
                wanted = " x ".join(f"{a}={mesh.shape[a]}" for a in (*group, axis))
                divisors = [d for d in range(1, size + 1) if size % d == 0]
                shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
                raise UserError(f"dimension {name} = {size} cannot be split over {wanted}; these divide: {shown}")
    return PartitionSpec(*(group if len(group) > 1 else group[0] if group else None for group in groups))


def sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Mapping = RULES) -> NamedSharding:
    """Sharding of an array of this shape and these dimension names; see `spec`."""
    return NamedSharding(mesh, spec(names, shape, mesh, rules))
