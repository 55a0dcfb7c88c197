# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a checkpoint to sharded device arrays; each device's bytes are read once.

Host memory on top of what the devices hold is one shard of one parameter. Where that would be large because many layers
are stacked, the layers are read one at a time and written into the stacked array on the device, which is donated and so
updated in place; then it is one shard of one layer.
"""

import functools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.checkpoint.formats.casting import cast_into
from qwen2_jax.checkpoint.formats.names import Tree, hf_names, put
from qwen2_jax.checkpoint.formats.protocol import Progress, RowTensors, Sharding
from qwen2_jax.checkpoint.formats.safetensors import aligned
from qwen2_jax.checkpoint.transfer.group_reads import read_groups
from qwen2_jax.checkpoint.transfer.row_reads import by_rows, moved
from qwen2_jax.parallel import sharding as shardings
from qwen2_jax.weights.forms import Form
from qwen2_jax.weights.params import ParamSpec, leaves

STAGE_BYTES = 512 * 2**20  # a larger shard of stacked layers is filled on the device, layer by layer


def param_shardings(mesh: jax.sharding.Mesh | None, rules: Mapping = shardings.RULES) -> Sharding:
    """The sharding of each parameter: on `mesh` by rules of qwen2_jax.parallel.sharding, or the first device."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return lambda spec: single
    return lambda spec: shardings.sharding(spec.axes, spec.shape, mesh, rules)


def read_params(
    tensors: RowTensors,
    specs: Tree,
    sharding: Sharding,
    *,
    progress: Progress | None = None,
    form: Form | None = None,
    stage_bytes: int | None = None,
) -> Tree:
    """The parameters declared by `specs`, in their dtypes. progress counts bytes of the tensors.

    form: of the weight matrices, each of which is rounded as soon as it is there, or keeps the groups of its file.
    stage_bytes: largest shard of stacked layers that is assembled on the host; default STAGE_BYTES, and any size on
    CPU, where the host's buffer becomes the device's array.
    """
    total, done = sum(info.nbytes for info in tensors.infos.values()), 0
    params: Tree = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, spec in leaves(specs):
            where = sharding(spec)
            kept = read_groups(tensors, spec, where, pool) if form and form.keeps_groups and form.serves(spec) else None
            shard = where.shard_shape(spec.shape)
            shard_bytes = math.prod(shard) * np.dtype(spec.dtype).itemsize
            limit = stage_bytes if stage_bytes is not None else math.inf if on_cpu(where) else STAGE_BYTES
            whole_layers = bool(spec.layers) and shard[0] == len(spec.layers) > 1
            if kept is None:
                if whole_layers and shard_bytes > limit:
                    stack = DeviceStack(spec, where)
                    for r in range(len(spec.layers)):
                        stack.set(r, _read(tensors, spec, where, pool, r))
                    array = stack.array()
                else:
                    array = _read(tensors, spec, where, pool, None)
            put(params, path, kept or (form.convert(array, spec, where) if form else array))
            done += math.prod(spec.shape) * tensors.infos[hf_names(spec, 0 if spec.layers else None)[0]].dtype.itemsize
            if progress is not None:
                progress(min(done, total), total)
    return params


def read_array(tensors: RowTensors, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
    """One parameter in its dtype; holds one shard of it in host memory."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return _read(tensors, spec, where, pool, None)


def _slices(where: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[jax.Device, tuple[slice, ...]]:
    """The slice of an array of this shape that each device of this host holds, with start and stop spelled out."""
    out = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        assert index is not None  # as jax says for devices of other hosts only
        out[device] = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
    return out


def _size(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in index)


def _read(tensors: RowTensors, spec: ParamSpec, where, pool: ThreadPoolExecutor, repeat: int | None) -> jax.Array:
    """The whole parameter, or one layer of it as [1, ...]; every device's shard is read from the files once.

    Of several hosts each reads whole rows, see row_reads.py.
    """
    shape = spec.shape if repeat is None else (1, *spec.shape[1:])
    wanted, where = where, by_rows(where, shape)
    owners_of: dict[tuple[slice, ...], list[jax.Device]] = {}  # devices that hold the same slice share one read
    for device, index in _slices(where, shape).items():
        owners_of.setdefault(index, []).append(device)
    arrays: list[jax.Array] = []
    for index, owners in owners_of.items():
        buffer = aligned(_size(index), spec.dtype)
        _fill(tensors, spec, index, buffer, pool, repeat or 0)
        arrays += [jax.device_put(buffer, device) for device in owners]
        if owners[0].platform != "cpu":
            jax.block_until_ready(arrays)  # the next shard's buffer is made when this one is on its device
    array = jax.make_array_from_single_device_arrays(shape, where, arrays)
    return array if where is wanted else moved(array, wanted)


def _fill(
    tensors: RowTensors, spec: ParamSpec, index, buffer: np.ndarray, pool: ThreadPoolExecutor, first: int
) -> None:
    """Fills the host buffer of one device with the slice `index` of the parameter, layer by layer, expert by expert."""
    jobs = []
    repeats = range(first + index[0].start, first + index[0].stop) if spec.layers else (None,)
    rows = buffer if spec.layers else [buffer]
    inner = index[1:] if spec.layers else index
    shape = spec.shape[1:] if spec.layers else spec.shape
    for repeat, row in zip(repeats, rows, strict=True):
        names = hf_names(spec, repeat)
        if "{e}" in spec.hf:
            experts = range(inner[0].start, inner[0].stop)
            jobs += [(names[e], part, inner[1:], shape[1:]) for e, part in zip(experts, row, strict=True)]
        else:
            jobs.append((names[0], row, inner, shape))
    for nbytes in pool.map(lambda job: tensors.infos[job[0]].read_into(job[1], job[2], job[3]), jobs):
        tensors.bytes_read += nbytes


class HostStack:
    """Layers gathered into one [R, ...] array in the host's memory, which on CPU is the device's memory."""

    def __init__(self, spec: ParamSpec, where: jax.sharding.Sharding):
        self.shape, self.where = spec.shape, where
        self.buffers = {d: aligned(_size(index), spec.dtype) for d, index in _slices(where, spec.shape).items()}

    def set(self, r: int, layer: jax.Array) -> None:
        """Layer r is `layer` [1, ...], placed as the stacked parameter is."""
        for shard in layer.addressable_shards:
            cast_into(self.buffers[shard.device][r], np.asarray(shard.data)[0])

    def array(self) -> jax.Array:
        arrays = [jax.device_put(buffer, device) for device, buffer in self.buffers.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.where, arrays)


class DeviceStack:
    """Layers written one by one into an [R, ...] array on its devices; a layer is all that exists beside it."""

    def __init__(self, spec: ParamSpec, where: jax.sharding.Sharding):
        self.stacked = jax.jit(functools.partial(jnp.zeros, spec.shape, spec.dtype), out_shardings=where)()

    def set(self, r: int, layer: jax.Array) -> None:
        """Layer r is `layer` [1, ...]. Waits, else the layers' buffers would pile up in the queue."""
        self.stacked = _set_layer(self.stacked, layer, r).block_until_ready()

    def array(self) -> jax.Array:
        return self.stacked


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, r: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stacked, layer, r, axis=0)


def on_cpu(where: jax.sharding.Sharding) -> bool:
    return all(device.platform == "cpu" for device in where.addressable_devices)  # type: ignore[attr-defined]
