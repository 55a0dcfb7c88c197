# SPDX-License-Identifier: Apache-2.0
"""Bytes that each host reads, holds and writes when a checkpoint is converted or loaded, by formula, without weights.

The formulas follow the code that does it (transfer/, orbax_folder.py), and a test holds them against what two real
processes read and write. Not counted: headers, indices and Orbax's own files, and the program itself (about 0.5 GiB).
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from qwen2_jax.checkpoint.api import open_checkpoint
from qwen2_jax.checkpoint.formats import names, orbax_folder
from qwen2_jax.checkpoint.formats.names import Leaf, Slot
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.formats.table import FORMATS
from qwen2_jax.checkpoint.transfer import multihost
from qwen2_jax.checkpoint.transfer.load import STAGE_BYTES
from qwen2_jax.checkpoint.transfer.row_reads import axes_of
from qwen2_jax.config.model_config import DTYPES, HUB_IDS, PRESETS
from qwen2_jax.errors import CheckpointError
from qwen2_jax.model.decoder import declare
from qwen2_jax.parallel.sharding import sharding
from qwen2_jax.weights.params import ParamSpec, Tree, leaves


@dataclasses.dataclass(frozen=True)
class Step:
    """Bytes of each host: read from files, held in host memory at the peak beside what devices hold, and written."""

    name: str
    reads: tuple[int, ...]
    holds: tuple[int, ...]
    writes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Declared:
    """A checkpoint as far as its bytes go."""

    format: Format
    specs: Tree
    infos: Mapping[str, TensorInfo]

    @property
    def table(self) -> dict[str, Slot]:
        return names.table(self.specs)


def declared(name: str | Path) -> Declared:
    """A folder on this machine with the dtypes of its tensors, or a preset or its Hub id as it is published.

    Nothing is downloaded. Raises CheckpointError for other names.
    """
    text = str(name).strip().lower()
    preset = text if text in PRESETS else {hub_id.lower(): key for key, hub_id in HUB_IDS.items()}.get(text)
    if preset is None or Path(name).expanduser().is_dir():
        if preset is None and str(name) != "demo" and not Path(name).expanduser().exists():
            raise CheckpointError(
                f"a plan downloads nothing, and {str(name)!r} is neither a folder here nor a preset; give a folder or "
                f"one of {', '.join(sorted(PRESETS))}"
            )
        opened = open_checkpoint(name)
        return Declared(opened.source.format, opened.specs, opened.tensors.infos)
    config = PRESETS[preset]
    specs = declare(config)[1]
    dtype = np.dtype(jnp.dtype(config.dtype))
    return Declared(FORMATS["hf"], specs, {n: TensorInfo(dtype, slot.shape) for n, slot in names.table(specs).items()})


def convert_step(source: Declared, to: str, count: int, *, dtype: str | None = None) -> Step:
    """Converting `source` into format `to` with `count` processes, see `convert`. dtype: of the new checkpoint."""
    if count < 1:
        raise CheckpointError(f"a plan for {count} hosts was asked for; give at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    old = source.infos
    new = old if dtype is None else {n: TensorInfo(np.dtype(jnp.dtype(dtype)), i.shape) for n, i in old.items()}
    dealt = multihost.shares(source.table, new, count)
    mine = [[name for unit in units for name in unit] for units in dealt]
    whole = [sum(old[name].nbytes for name in own) for own in mine]
    # A tensor of a safetensors file is looked at where it is mapped, and copied only to be cast.
    tensors = [max((_held(old[name], new[name]) for name in own), default=0) for own in mine]
    arrays = names.orbax_leaves(source.specs)
    groups = [_largest_group([leaf for leaf in arrays if leaf.names[0] in set(own)], old) for own in mine]
    name = f"convert {source.format.name} to {to}"
    if to == "hf":
        writes = tuple(sum(new[name].nbytes for name in own) for own in mine)
        if source.format.whole_arrays:
            tensors = [g + t for g, t in zip(groups, tensors, strict=True)]
        return Step(name, tuple(whole), tuple(tensors), writes)
    rows = [_rows(leaf, count) for leaf in arrays]
    written = [_nbytes(leaf, new) // parts for leaf, parts in zip(arrays, rows, strict=True)]
    read = [_nbytes(leaf, old) // parts for leaf, parts in zip(arrays, rows, strict=True)]
    cut = [parts > 1 or count == 1 for parts in rows]  # every host reads an uncut array, the first writes it
    group = _largest_group(arrays, new, dict(zip(arrays, rows, strict=True)))
    writes = tuple(sum(n for n, c in zip(written, cut, strict=True) if c or host == 0) for host in range(count))
    reads = tuple(sum(read) + (own if count > 1 else 0) for own in whole)  # once to write, and once whole to hash
    hashing = groups if source.format.whole_arrays else tensors
    return Step(name, reads, tuple(max(group, held) for held in hashing), writes)


def load_step(source: Declared, kind: str, mesh: Mapping[str, int], count: int, *, dtype: str | None = None) -> Step:
    """Loading onto a mesh, whose devices `count` hosts hold in row-major order, as many each. dtype: of the arrays."""
    devices = math.prod(mesh.values())
    if devices % count:
        raise CheckpointError(
            f"the mesh {dict(mesh)} has {devices} devices, which {count} hosts cannot share evenly; give a mesh whose "
            f"sizes multiply to a multiple of {count}"
        )
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    per_host = devices // count
    coordinates = list(itertools.product(*map(range, mesh.values())))
    reads, held = [0] * count, 0
    for _, spec in leaves(source.specs):
        where = sharding(spec.axes, spec.shape, abstract)  # type: ignore[arg-type]  # its sizes are all that is asked
        used = [
            i
            for i, axis in enumerate(mesh)
            if axis in {a for axes in axes_of(where.spec, len(spec.shape)) for a in axes}
        ]
        parts = math.prod(tuple(mesh.values())[i] for i in used)
        infos = [source.infos[name] for name in _names(spec)]
        size = sum(info.nbytes for info in infos)
        for host in range(count):
            own = coordinates[host * per_host : (host + 1) * per_host]
            reads[host] += size * len({tuple(c[i] for i in used) for c in own}) // parts
        item = np.dtype(jnp.dtype(dtype)).itemsize if dtype else max(info.dtype.itemsize for info in infos)
        shard = math.prod(spec.shape) * item // parts
        held = max(held, shard if shard <= STAGE_BYTES or not spec.layers else shard // len(spec.layers))
    where_from = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    return Step(f"load {kind} on {where_from}", tuple(reads), (held,) * count, (0,) * count)


def _names(spec: ParamSpec) -> list[str]:
    repeats = range(len(spec.layers)) if spec.layers else (None,)
    return [name for repeat in repeats for name in names.hf_names(spec, repeat)]


def _held(old: TensorInfo, new: TensorInfo) -> int:
    return old.nbytes + (new.nbytes if old.dtype != new.dtype else 0)


def _nbytes(leaf: Leaf, infos: Mapping[str, TensorInfo]) -> int:
    """Of an array in an Orbax folder: experts of different dtypes share the widest."""
    return math.prod(leaf.shape) * np.dtype(jnp.result_type(*(infos[name].dtype for name in leaf.names))).itemsize


def _rows(leaf: Leaf, count: int) -> int:
    """Into how many parts hosts cut an array."""
    return count if "host" in multihost.cut_by_hosts(leaf.shape, count) else 1


def _largest_group(arrays: list[Leaf], infos: Mapping[str, TensorInfo], parts: Mapping[Leaf, int] | None = None) -> int:
    """Bytes of the largest group of arrays that Orbax is given at once, of which a host holds its part."""
    found = orbax_folder.groups(arrays, lambda leaf: _nbytes(leaf, infos))
    return max(
        (sum(_nbytes(leaf, infos) // (parts[leaf] if parts else 1) for leaf in group) for group in found), default=0
    )
