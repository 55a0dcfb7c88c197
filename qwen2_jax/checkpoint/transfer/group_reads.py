# SPDX-License-Identifier: Apache-2.0
"""From the integers of a quantised checkpoint to a weight that keeps them in memory (weights/int4_groups.py).

Host memory on top of what the devices hold is one array with all of its layers: a byte for each weight.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from qwen2_jax.checkpoint.formats.names import hf_names
from qwen2_jax.checkpoint.formats.protocol import RowTensors
from qwen2_jax.checkpoint.formats.stored_tensor import BLOCK, GroupLayout, StoredTensor
from qwen2_jax.weights import weight
from qwen2_jax.weights.int4_groups import Groups
from qwen2_jax.weights.params import ParamSpec


def read_groups(
    tensors: RowTensors, spec: ParamSpec, where: jax.sharding.Sharding, pool: ThreadPoolExecutor
) -> Groups | None:
    """A weight matrix in the groups of its file; None where one of its tensors is not stored in groups.

    Layers and experts of one array may have other layouts (a Q4_K_M file mixes Q4_K and Q6_K): then the array gets the
    one that holds them all.
    """
    stored = [tensors.infos[name] for r in range(len(spec.layers)) or (None,) for name in hf_names(spec, r)]
    layouts = [tensor.groups for tensor in stored]
    if not layouts or None in layouts:
        return None
    layout = layouts[0]
    for other in layouts[1:]:
        layout |= other  # type: ignore[operator]
    assert layout is not None
    rows, width = spec.hf_shape[0], math.prod(spec.hf_shape[1:])
    values = np.empty((len(stored), rows, width), np.int8)
    scale = np.empty((len(stored), rows, width // layout.size), np.float32)
    offset = np.zeros_like(scale) if layout.offset else None
    for n, tensor in enumerate(stored):
        out = values[n], scale[n], None if offset is None else offset[n]
        tensors.bytes_read += tensor.stored_bytes
        list(pool.map(lambda block, tensor=tensor, out=out: _fill(tensor, block, layout, *out), _blocks(tensor, width)))
    outputs = spec.shape[: len(spec.shape) - weight.summed(spec)]
    integers = values.astype(ml_dtypes.int4) if layout.bits == 4 else values
    scale = scale.reshape(*outputs, -1)
    offset = None if offset is None else offset.reshape(scale.shape)
    groups = Groups(integers.reshape(spec.shape), scale, offset, weight.summed(spec)).fitted(where)  # type: ignore[arg-type]
    return jax.tree.map(_placed, groups, weight.shardings(groups, where))


def _blocks(tensor: StoredTensor, width: int) -> list[slice]:
    """Rows that are read at a time."""
    step = max(32, BLOCK // width // 32 * 32)
    return [slice(start, min(start + step, tensor.shape[0])) for start in range(0, tensor.shape[0], step)]


def _fill(tensor: StoredTensor, rows: slice, layout: GroupLayout, values, scale, offset) -> None:
    q, of_group, off = tensor.read_integers(rows)
    times = scale.shape[-1] // of_group.shape[-1]
    values[rows], scale[rows] = q, np.repeat(of_group, times, axis=-1)
    if off is not None:
        offset[rows] = np.repeat(off, times, axis=-1)


def _placed(part, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(part.shape, where, lambda index: np.asarray(part[index]))
