# SPDX-License-Identifier: Apache-2.0
"""Reading full rows where a device needs a part of each: hosts read each byte once, and the devices exchange parts.

Files are row-major. A mesh that splits the last dimension of a matrix over hosts would have every host pick a few
hundred bytes out of every row: a disk reads whole blocks, and Orbax whole chunks, so each host would read everything.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[str, ...]


def rows_of(axes: Sequence[Axes], shape: Sequence[int], sizes: Mapping[str, int]) -> list[Axes]:
    """`axes`, the mesh axes that split each dimension, with those of the last one moved to earlier ones that divide.

    sizes: of the mesh axes. An axis that no earlier dimension takes stays. The dimension of stacked layers, if it is
    not split, is the first to be asked: a host then reads some layers whole.
    """
    moved = [tuple(a) for a in axes]
    for axis in moved[-1] if len(moved) > 1 else ():
        for d, size in enumerate(shape[:-1]):
            if size % (sizes[axis] * math.prod(sizes[a] for a in moved[d])) == 0:
                moved[d] += (axis,)
                moved[-1] = tuple(a for a in moved[-1] if a != axis)
                break
    return moved


def axes_of(spec: PartitionSpec, ndim: int) -> list[Axes]:
    """The mesh axes of each dimension of an array."""
    padded = (*spec, *[None] * (ndim - len(spec)))
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in padded]


def by_rows(where: jax.sharding.Sharding, shape: Sequence[int]) -> jax.sharding.Sharding:
    """Where to read an array that is wanted at `where`: there, or in whole rows if other hosts read parts of it too."""
    if not isinstance(where, NamedSharding) or where.is_fully_addressable:
        return where
    axes = axes_of(where.spec, len(shape))
    moved = rows_of(axes, shape, where.mesh.shape)
    return where if moved == axes else NamedSharding(where.mesh, PartitionSpec(*(a or None for a in moved)))


def moved(array: jax.Array, where: jax.sharding.Sharding) -> jax.Array:
    """The array at `where`; the devices exchange the missing parts. `array` is deleted."""
    if array.sharding == where:
        return array
    out = _move(where)(array).block_until_ready()
    array.delete()  # now: the next one would be read beside two copies of this one
    return out


@functools.cache
def _move(where: jax.sharding.Sharding):
    """Moves the bits as whole numbers: a backend that moves bfloat16 by way of float32 may lose the smallest values."""

    def move(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(jax.lax.with_sharding_constraint(bits, where), x.dtype)

    return jax.jit(move, out_shardings=where)
