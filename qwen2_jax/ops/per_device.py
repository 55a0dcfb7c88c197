# SPDX-License-Identifier: Apache-2.0
"""Runs an operation on each device's part of its arrays, found from the names of their dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen2_jax.errors import UserError
from qwen2_jax.parallel import sharding

# B batch  T query
Names = Sequence[str | None]

FEW_QUERIES = 8  # up to this many queries per row, attention over a cache is a decode step, not a prefill

CACHE = ("layers", "batch", "kv_heads", "slots", None)


def per_row(numbers, B: int):
    """Numbers as [B], so that they are sharded with the batch; None stays None."""
    return tuple(None if x is None else jnp.broadcast_to(jnp.asarray(x), (B,)) for x in numbers)


def widened(x_BKSH: jax.Array, scale_BKS: jax.Array | None, dtype) -> jax.Array:
    """Keys or values of a cache, in `dtype` where they are int8 with scales."""
    return x_BKSH if scale_BKS is None else (x_BKSH.astype(jnp.float32) * scale_BKS[..., None]).astype(dtype)


def before_weights(x: jax.Array) -> jax.Array:
    """The same activations [B, T, ...]; those of a decode step on a mesh have their rows sharded as sharding.step_rows
    says.

    Applied before and after matrix products; otherwise XLA would shard them as the kernels in between do.
    """
    mesh = sharding.current_mesh()
    if mesh is None or x.shape[1] > FEW_QUERIES:
        return x
    rows = sharding.step_rows(len(x), mesh)
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows or None, *free))


def axes_of_names(args: tuple, names: tuple[Names, ...]) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each named dimension is sharded: those of its rule that divide it in every array.

    All arrays of one argument have the same `names`; an array with fewer dimensions has the first of them. Query heads
    are sharded like their key heads, or neither is.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return {}
    axes: dict[str, tuple[str, ...]] = {}
    for arg, of in zip(args, names, strict=True):
        for leaf in jax.tree.leaves(arg):
            for name, size in zip(of, leaf.shape, strict=False):
                if name is not None:
                    fits = sharding.dividing(name, size, mesh)
                    axes[name] = min(axes.get(name, fits), fits, key=len)
    if "heads" in axes and "kv_heads" in axes:
        axes["heads"] = axes["kv_heads"] = min(axes["heads"], axes["kv_heads"], key=len)
    return axes


def on_each_device(run: Callable, args: tuple, names: tuple[Names, ...], out: Names, asked: str | None) -> Any:
    """run(*args), on a mesh with each device's part of args. names, out: dimension names of arguments and result.

    Raises UserError where the implementation requested by name (`asked`) does not support the inputs."""
    try:
        return _shared_out(run, args, names, out)
    except NotImplementedError as why:
        if asked is None:
            raise
        raise UserError(f"the implementation that was asked for {why}; name another, or none") from why


def _shared_out(run: Callable, args: tuple, names: tuple[Names, ...], out: Names) -> Any:
    mesh = sharding.current_mesh()
    if mesh is None:
        return run(*args)
    axes = axes_of_names(args, names)

    def spec(of):
        return PartitionSpec(*(axes.get(name) or None for name in of))

    specs = tuple(jax.tree.map(lambda x, of=of: spec(of[: x.ndim]), arg) for arg, of in zip(args, names, strict=True))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec(out), check_vma=False)(*args)
