# SPDX-License-Identifier: Apache-2.0
"""From the names of dimensions to one device's share of an operation."""

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
    """Numbers as [B], so that they are split with the batch; None stays None."""
    return tuple(None if x is None else jnp.broadcast_to(jnp.asarray(x), (B,)) for x in numbers)


def before_weights(x_BT: jax.Array) -> jax.Array:
    """The same activations [B, T, ...], of a decode step on a mesh with rows divided as sharding.step_rows says.

    Said where activations come from products or go into some; else XLA divides them as the kernels between do.
    """
    mesh = sharding.current_mesh()
    if mesh is None or x_BT.shape[1] > FEW_QUERIES:
        return x_BT
    rows = sharding.step_rows(len(x_BT), mesh)
    free = (PartitionSpec.UNCONSTRAINED,) * (x_BT.ndim - 1)
    return jax.lax.with_sharding_constraint(x_BT, PartitionSpec(rows or None, *free))


def axes_of_names(args: tuple, names: tuple[Names, ...]) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each named dimension is split: those of its rule that divide it in every array.

    All arrays of one argument have the same `names`; one with fewer dimensions has the first of them. Query heads go
    with their key heads, or both stay whole.
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
    """run(*args), on a mesh with each device's share of args. `names`, `out`: of the dimensions."""
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

    def place(of):
        return PartitionSpec(*(axes.get(name) or None for name in of))

    specs = tuple(jax.tree.map(lambda x, of=of: place(of[: x.ndim]), arg) for arg, of in zip(args, names, strict=True))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=place(out), check_vma=False)(*args)
