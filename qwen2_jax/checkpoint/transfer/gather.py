# SPDX-License-Identifier: Apache-2.0
"""Copies an array that is sharded over several hosts into one host's memory, in blocks of bounded size.

There is no all-gather: for a block, every device puts its part into an array of zeros, and a sum over the devices gives
the block. The sum is exact, because it adds the elements' bits as integers and all but one addend are zero.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.checkpoint.transfer.row_reads import Axes, axes_of

PIECE_BYTES = 64 * 2**20  # of device memory, twice, on every device


def layer(param, r: int | None, *, keepdims: bool = False) -> jax.Array:
    """Layer r of a stacked parameter, or the parameter where r is None, on the devices where it is.

    param: jax.Array, or an object that computes layers when it is indexed (as in upcycling). keepdims: as [1, ...].
    """
    if r is None:
        return param
    if not isinstance(param, jax.Array) or param.is_fully_addressable:
        return param[r : r + 1] if keepdims else param[r]
    where = param.sharding
    if not isinstance(where, NamedSharding):
        raise TypeError(f"a parameter on several hosts is laid out by {type(where).__name__}; a mesh is expected")
    rest = [axes or None for axes in axes_of(where.spec, param.ndim)[1:]]
    spec = PartitionSpec(None, *rest) if keepdims else PartitionSpec(*rest)
    return _take(NamedSharding(where.mesh, spec), keepdims)(param, r)


@functools.cache
def _take(where: NamedSharding, keepdims: bool):
    """One compiled program for all layers of a parameter."""
    return jax.jit(
        lambda stacked, r: jax.lax.dynamic_index_in_dim(stacked, r, 0, keepdims=keepdims), out_shardings=where
    )


def collect(array: jax.Array, keep: bool) -> np.ndarray | None:
    """All of an array [rows, ...] as a host array in the processes with keep=True; None in the others.

    Where its parts are on several hosts, all processes call this at the same time.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array) if keep else None
    where = array.sharding
    if not isinstance(where, NamedSharding):
        raise TypeError(f"an array on several hosts is laid out by {type(where).__name__}; a mesh is expected")
    axes = tuple(axes_of(where.spec, array.ndim))
    rows, row_bytes = len(array), math.prod(array.shape[1:]) * array.dtype.itemsize
    n = max(1, min(rows, PIECE_BYTES // max(1, row_bytes)))
    out = np.empty(array.shape, array.dtype) if keep else None
    for start in range(0, rows, n):
        start = min(start, rows - n)  # the last piece is as large as the others: one program for all
        piece = _piece(where.mesh, axes, n)(array, start)
        if out is None:
            piece.block_until_ready()  # else pieces that this process does not keep would queue up
        else:
            word = np.dtype(f"u{array.dtype.itemsize}")
            out[start : start + n] = np.asarray(piece.addressable_data(0)).astype(word).view(array.dtype)
    return out


@functools.cache
def _piece(mesh: Mesh, axes_of_dims: tuple[Axes, ...], n: int):
    """Program (array, start) -> the bits of rows [start, start + n) as uint32, whole on every device."""
    used = tuple(axis for axes in axes_of_dims for axis in axes)
    where = PartitionSpec(*(axes or None for axes in axes_of_dims))

    def part(block: jax.Array, start: jax.Array) -> jax.Array:
        cut = list(zip(axes_of_dims, block.shape, strict=True))
        first = [jax.lax.axis_index(axes) * size if axes else 0 for axes, size in cut]
        full = [size * math.prod(mesh.shape[a] for a in axes) for axes, size in cut]
        rows = start + jnp.arange(n) - first[0]
        here = (rows >= 0) & (rows < block.shape[0])
        taken = jnp.take(block, jnp.clip(rows, 0, block.shape[0] - 1), axis=0)
        bits = jax.lax.bitcast_convert_type(taken, f"uint{8 * taken.dtype.itemsize}").astype(jnp.uint32)
        bits = jnp.where(here.reshape(-1, *[1] * (block.ndim - 1)), bits, 0)
        piece = jax.lax.dynamic_update_slice(jnp.zeros((n, *full[1:]), jnp.uint32), bits, (0, *first[1:]))
        return jax.lax.psum(piece, used)

    return jax.jit(
        jax.shard_map(part, mesh=mesh, in_specs=(where, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False)
    )
