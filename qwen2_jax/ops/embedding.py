# SPDX-License-Identifier: Apache-2.0
"""Look-ups in a table that is sharded over a mesh: each device looks up its part, and only the rows found are sent.

Each row is on one part of the vocabulary and the other parts give zeros, so the sum over the parts is exact. Where the
columns are sharded over devices that have different tokens, each looks up its columns for the tokens of all of them,
and an all-to-all exchanges them for all columns of its own tokens. Neither the table nor its gradient is sent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from qwen2_jax import ops
from qwen2_jax.parallel import sharding

# B batch  T tokens  V rows of the table  D columns


class Split(NamedTuple):
    """Mesh axes over which the rows and columns of a table and the two dimensions of the ids are sharded."""

    mesh: AbstractMesh
    vocab: tuple[str, ...]
    columns: tuple[str, ...]
    ids: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab or None, self.columns or None)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(*(axes or None for axes in self.ids))

    def dimension(self, axis: str) -> int | None:
        """The dimension of the ids that is sharded over an axis, or None."""
        return next((i for i, axes in enumerate(self.ids) if axis in axes), None)


def look_up(find: Callable[[Any, jax.Array], jax.Array], table_VD: Any, ids: jax.Array) -> jax.Array:
    """find(table, ids): rows [..., D] of a table, which on a mesh may be sharded.

    table_VD: an array, or a tree of arrays of which the first dimension is V and the second, if there is one, D.
    """
    split = _split(table_VD.shape, ids)
    if split is None:
        return find(table_VD, ids)

    def run(table_VD, ids):
        ids = _of_all(ids, split)
        local, mine = _local(ids, table_VD.shape[0], split)
        rows = jnp.where(mine[..., None], find(table_VD, local), 0)
        rows = lax.psum(rows, split.vocab) if split.vocab else rows
        for axis in reversed(split.columns):  # the last axis splits D most finely: it is undone first
            dimension = split.dimension(axis)
            if dimension is None:
                rows = lax.all_gather(rows, axis, axis=2, tiled=True)
            else:
                rows = lax.all_to_all(rows, axis, split_axis=dimension, concat_axis=2, tiled=True)
        return rows

    parts = jax.tree.map(lambda x: PartitionSpec(*split.table[: x.ndim]), table_VD)
    return _on_each_device(run, split, (parts, split.tokens), PartitionSpec(*split.tokens, None))(table_VD, ids)


def add_up(shape: tuple[int, int], ids: jax.Array, rows: jax.Array) -> jax.Array:
    """float32 [V, D], the shape given: the sum of the rows [..., D] of each id. The transpose of look_up."""
    split = _split(shape, ids)

    def run(ids, rows):
        if split is None:
            return jnp.zeros(shape, jnp.float32).at[ids].add(rows.astype(jnp.float32))
        for axis in split.columns:
            dimension = split.dimension(axis)
            if dimension is None:
                width = rows.shape[2] // split.mesh.shape[axis]
                rows = lax.dynamic_slice_in_dim(rows, lax.axis_index(axis) * width, width, axis=2)
            else:
                rows = lax.all_to_all(rows, axis, split_axis=2, concat_axis=dimension, tiled=True)
        ids = _of_all(ids, split)
        V = shape[0] // sharding.parts(split.vocab, split.mesh)
        local, mine = _local(ids, V, split)
        sums_VD = jnp.zeros((V, rows.shape[2]), jnp.float32)
        sums_VD = sums_VD.at[jnp.where(mine, local, V)].add(rows.astype(jnp.float32), mode="drop")
        others = tuple(axis for axes in split.ids for axis in axes if axis not in split.columns)
        return lax.psum(sums_VD, others) if others else sums_VD

    if split is None:
        return run(ids, rows)
    return _on_each_device(run, split, (split.tokens, PartitionSpec(*split.tokens, None)), split.table)(ids, rows)


def _split(shape: tuple[int, ...], ids: jax.Array) -> Split | None:
    """None where every device has the whole table, or the ids are not [B, T]."""
    mesh = sharding.current_mesh()
    if mesh is None or ids.ndim != 2:
        return None

    def of(name: str, size: int) -> tuple[str, ...]:
        axes = sharding.dividing(name, size, mesh, sharding.current_rules())
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    rows = of("batch", ids.shape[0]), of("length", ids.shape[1])
    if ids.shape[1] <= ops.FEW_QUERIES:  # a decode step
        rows = tuple(axis for axis in sharding.step_rows(ids.shape[0], mesh) if axis in rows[0]), rows[1]
    split = Split(mesh, of("vocab", shape[0]), of("embed", shape[1]), rows)
    return split if split.vocab or split.columns else None


def _of_all(ids: jax.Array, split: Split) -> jax.Array:
    """The ids of all devices with other columns, in the order in which look_up's all-to-alls split them."""
    for axis in split.columns:
        dimension = split.dimension(axis)
        if dimension is not None:
            ids = lax.all_gather(ids, axis, axis=dimension, tiled=True)
    return ids


def _local(ids: jax.Array, V: int, split: Split) -> tuple[jax.Array, jax.Array]:
    """(ids relative to this device's V rows of the table, 0 for others; mask of those on this device)."""
    local = ids - lax.axis_index(split.vocab) * V if split.vocab else ids
    mine = (local >= 0) & (local < V)
    return jnp.where(mine, local, 0), mine


def _on_each_device(run: Callable, split: Split, specs: tuple, out: PartitionSpec) -> Callable:
    return jax.shard_map(run, mesh=split.mesh, in_specs=specs, out_specs=out, check_vma=False)
