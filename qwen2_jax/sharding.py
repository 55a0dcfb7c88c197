# SPDX-License-Identifier: Apache-2.0
"""From the names of a parameter's dimensions to its place on a device mesh: one table, one check."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.errors import UserError

# The name of a dimension -> the mesh axis (or axes) it is split over. None: every device holds all of it.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


def make_mesh(**axes: int) -> Mesh:
    """A mesh with the given axes, e.g. make_mesh(fsdp=4, tensor=2). Axes are Auto: XLA places the collectives."""
    sizes, devices = math.prod(axes.values()), len(jax.devices())
    if sizes != devices:
        raise UserError(f"mesh {axes} needs {sizes} devices; {devices} are here: the sizes' product must be {devices}")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def on(mesh: Mesh | None, function: Callable) -> Callable:
    """`function`, traced with `mesh` in context: what qwen2_jax.ops divides its work over. None changes nothing."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def current_mesh() -> AbstractMesh | None:
    """The mesh of the `on` that the caller is traced in, if its work is not divided yet over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def axes_of(name: str | None, mesh: Mesh | AbstractMesh, rules: Mapping = RULES) -> tuple[str, ...]:
    """The axes of `mesh` over which the dimension called `name` is split."""
    axis = None if name is None else rules[name]
    wanted = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return tuple(a for a in wanted if a in mesh.axis_names)


def dividing(name: str, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """As many of the axes of `name`, from the first, as divide a dimension of this size."""
    axes = axes_of(name, mesh)
    while size % math.prod(mesh.shape[a] for a in axes):
        axes = axes[:-1]
    return axes


def spec(names: Sequence[str | None], mesh: Mesh, rules: Mapping = RULES) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions are called `names`; axes that `mesh` lacks are left out."""

    axes = [axes_of(name, mesh, rules) for name in names]
    used = [a for group in axes for a in group]
    if len(set(used)) < len(used):
        raise ValueError(f"two dimensions of {tuple(names)} map to one mesh axis: {axes}")
    return PartitionSpec(*(group if len(group) > 1 else group[0] if group else None for group in axes))


def sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Mapping = RULES) -> NamedSharding:
    """Where an array of this shape and these dimension names lives. Raises UserError naming the sizes that divide."""
    partition = spec(names, mesh, rules)
    for name, size, axes in zip(names, shape, partition, strict=True):
        parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
            raise UserError(f"dimension {name} = {size} cannot be split over {axes}={parts}; these divide: {shown}")
    return NamedSharding(mesh, partition)
