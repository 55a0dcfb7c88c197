# SPDX-License-Identifier: Apache-2.0
"""An Orbax folder: the parameters of the unrolled model, one array per layer, written and read in bounded groups.

One array per layer, and not one per stack, so that a model larger than the host's memory can be converted (Orbax takes
an array whole), so that layers may differ in dtype, and so that stacked and unrolled models load from one folder.
Only Orbax's public v1 interface is used.
"""

import contextlib
import ctypes
import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen2_jax.checkpoint.formats.casting import as_dtype
from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.names import Leaf, Slot, Tree, get, leaf_path, nested, orbax_leaves, put, table
from qwen2_jax.checkpoint.formats.protocol import Format, Progress, Sharding
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.small_files import LAYOUT, SmallFiles, read_json
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.manifest import Manifest
from qwen2_jax.checkpoint.transfer.load import DeviceStack, HostStack, on_cpu
from qwen2_jax.checkpoint.transfer.row_reads import by_rows, moved
from qwen2_jax.errors import CheckpointError
from qwen2_jax.weights.forms import Form
from qwen2_jax.weights.params import ParamSpec, leaves
from qwen2_jax.weights.weight import Weight

# glibc keeps what many threads have freed; its trim gives it back. None elsewhere.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
STRAY = "_read_array_index_and_device_put"  # Orbax's coroutine that reads one piece of an array
GROUP_BYTES = 128 * 2**20
# Pieces of an array on disk. A host reads all pieces its rows touch (see row_reads.py): of a matrix of 29568 x 8192 of
# which 16 hosts read 1848 rows each, pieces of 32 MiB, 4096 rows high, would have each host read twice as much or more.
CHUNK_BYTES = 2 * 2**20
ROW_BYTES = 2**18  # stacked matrices (experts, heads) of at least this size are pieces of their own


def _orbax() -> Any:
    """Its v1 interface, which takes a second to import: this file alone is also imported to recognise a folder."""
    from orbax.checkpoint import v1

    return v1


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    """Orbax with our storage options, and without its advice to callers who pass no shardings."""
    ocp = _orbax()
    _silence_stray_reads()
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained weights do not compress; the time would be lost
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.scoped_storage_options_creator = _chunks
    context.pytree.loading.partial_load = True
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with context, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sharding info not provided")
            yield ocp
    finally:
        absl.setLevel(level)


@functools.cache
def _silence_stray_reads() -> None:
    """Drops what Orbax's other reads raise after one has failed: no caller is left, so Python would print hundreds."""
    report = sys.unraisablehook

    def hook(stray: Any) -> None:
        closed = isinstance(stray.exc_value, RuntimeError) and str(stray.exc_value) == "Event loop is closed"
        if not closed and getattr(stray.object, "__qualname__", None) != STRAY:
            report(stray)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", message=f"coroutine '{STRAY}' was never awaited", category=RuntimeWarning)


@contextlib.contextmanager
def _reading(path: Any, what: str) -> Iterator[None]:
    """What Orbax raises inside is a CheckpointError that names the folder, but for the machine's own failures."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as why:  # damage shows as anything: ValueError, KeyError, AttributeError, NotImplementedError
        reason = f"{type(why).__name__}: {' '.join(str(why).split())}"[:300]
        raise CheckpointError(f"{path} {what}: {reason}; fetch or convert it again") from None


def _chunks(_, array: jax.Array):
    """Experts and heads [1, E, ...] are cut between each other first; Orbax would cut the largest dimension."""
    if array.ndim < 4 or math.prod(array.shape[2:]) * array.dtype.itemsize < ROW_BYTES:
        return None
    return _orbax().options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(1,))


def _release() -> None:
    """Gives freed memory back to the system: the pieces that Orbax's threads read and wrote would add up."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def host() -> jax.sharding.Sharding:
    """The sharding of arrays in the host's memory, whatever accelerators there are."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def groups(items: Iterable[Any], nbytes) -> Iterator[list[Any]]:
    """Consecutive items whose sizes nbytes(item) sum to at most GROUP_BYTES, or single ones."""
    group: list[Any] = []
    room = 0
    for item in items:
        size = nbytes(item)
        if group and size > room:
            yield group
            group = []
        if not group:
            room = GROUP_BYTES
        group.append(item)
        room -= size
    if group:
        yield group


def write(path, sizes: Mapping[Leaf, int], make: Callable[[Leaf], jax.Array], *, about: Mapping[str, Any]) -> None:
    """Writes one checkpoint at `path`, in groups: make(leaf) is called when its turn comes. sizes: bytes of each array.

    Complete only when this returns: until then everything is under another name.
    """
    with _session() as ocp:
        for group in groups(sizes, sizes.__getitem__):
            ocp.partial.save(path, nested({leaf.path: make(leaf) for leaf in group}), custom_metadata=dict(about))
            _release()
        ocp.partial.finalize(path)


class OrbaxFolder:
    """An opened Orbax folder. `check` fills `infos` with the tensors of a Hugging Face folder that it can yield.

    original: name -> TensorInfo as the folder's manifest recorded it; where the dtype on disk is larger (experts of one
    layer that differed in dtype), tensors come back in the recorded one. layout: of the safetensors files that the
    folder was converted from.
    """

    def __init__(self, path, original: Mapping[str, TensorInfo] | None = None, layout: Layout | None = None):
        self._layout = layout
        self.path = path.absolute() if isinstance(path, Path) else path  # Orbax sees nothing under a relative path
        self.original = original or {}
        with _session() as ocp, _reading(path, "is not a complete Orbax checkpoint"):
            tree = ocp.metadata(self.path).metadata
        if not isinstance(tree, dict):
            raise CheckpointError(
                f"{path}: the list of its arrays cannot be read; the checkpoint is damaged or incomplete"
            )
        with _reading(path, "has a damaged list of arrays"):
            self.arrays = {tuple(map(str, key)): (tuple(m.shape), np.dtype(m.dtype)) for key, m in leaves(tree)}
        self.leaves: list[Leaf] = []
        self.infos: dict[str, TensorInfo] = {}

    def check(self, table: Mapping[str, Slot], wanted: Sequence[Leaf]) -> "OrbaxFolder":
        """Compares the folder with the model's arrays; reports everything that is wrong in one CheckpointError."""
        errors = CollectedErrors(str(self.path))
        have = {".".join(path): shape for path, (shape, _) in self.arrays.items()}
        errors.compare(have, {".".join(leaf.path): leaf.shape for leaf in wanted})
        errors.raise_any()
        self.leaves = list(wanted)
        for leaf in wanted:
            for name in leaf.names:
                shape = table[name].shape
                recorded = self.original.get(name)
                dtype = (
                    recorded.dtype if recorded is not None and recorded.shape == shape else self.arrays[leaf.path][1]
                )
                self.infos[name] = TensorInfo(dtype, shape)
        return self

    def _nbytes(self, leaf: Leaf) -> int:
        return math.prod(leaf.shape) * self.arrays[leaf.path][1].itemsize

    def layout(self) -> Layout | None:
        """See Reader in protocol.py."""
        return self._layout

    def read_array(self, leaf: Leaf, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
        """See ArrayTensors in protocol.py."""
        (array,) = self.read([(leaf, np.dtype(spec.dtype), where)])
        return array

    def read(self, group: Sequence[tuple[Leaf, np.dtype, jax.sharding.Sharding]]) -> list[jax.Array]:
        """The arrays of some leaves in the dtypes and shardings given; each device reads the chunks of its shard."""
        wanted = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where) for leaf, dtype, where in group}
        with _session() as ocp, _reading(self.path, "is damaged"):
            tree = ocp.load(self.path, nested(wanted))
        _release()
        return [get(tree, leaf.path) for leaf, _, _ in group]

    def stream(self, names: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        asked = set(names)
        if mine is not None:
            asked = {name for name in names if name in mine}
        chosen = [leaf for leaf in self.leaves if not asked.isdisjoint(leaf.names)]
        turns = list(groups(chosen, self._nbytes))
        for group in turns:
            arrays = self.read([(leaf, self.arrays[leaf.path][1], host()) for leaf in group])
            for leaf in group:
                values = np.asarray(arrays.pop(0)).reshape(len(leaf.names), -1)
                for name, value in zip(leaf.names, values, strict=True):
                    if name in asked:
                        info = self.infos[name]
                        yield name, as_dtype(value, info.dtype).reshape(info.shape)
                del values
        # Orbax counts its calls and waits for hosts that have made fewer: who has fewer groups than another reads on.
        for _ in range(_most(len(turns)) - len(turns)):
            smallest = min(self.leaves, key=self._nbytes)
            self.read([(smallest, self.arrays[smallest.path][1], host())])

    def read_params(
        self, specs: Tree, sharding: Sharding, *, progress: Progress | None = None, form: Form | None = None
    ) -> Tree:
        """See Reader in protocol.py."""
        layers: list[tuple[tuple, ParamSpec, int | None, Leaf]] = []
        by_path = {leaf.path: leaf for leaf in self.leaves}
        for path, spec in leaves(specs):
            for r, layer in enumerate(spec.layers):
                layers.append((path, spec, r, by_path[leaf_path(path, layer)]))
            if not spec.layers:
                layers.append((path, spec, None, by_path[leaf_path(path, None)]))
        total, done = sum(map(self._nbytes, self.leaves)), 0
        flat: dict[tuple, Weight] = {}
        stacks: dict[tuple, HostStack | DeviceStack] = {}

        def nbytes(item) -> int:  # on disk or as a parameter, whichever is more
            _, spec, _, leaf = item
            return max(self._nbytes(leaf), math.prod(leaf.shape) * spec.dtype.itemsize)

        for group in groups(layers, nbytes):
            arrays = self.read([(leaf, spec.dtype, by_rows(sharding(spec), leaf.shape)) for _, spec, _, leaf in group])
            for path, spec, r, leaf in group:
                array = moved(arrays.pop(0), sharding(spec))
                done += self._nbytes(leaf)
                if r is None or len(spec.layers) == 1:
                    flat[path] = array if form is None else form.convert(array, spec, sharding(spec))
                    continue
                if path not in stacks:
                    stacks[path] = (HostStack if on_cpu(sharding(spec)) else DeviceStack)(spec, sharding(spec))
                stacks[path].set(r, array)
                if r == len(spec.layers) - 1:
                    array = stacks.pop(path).array()
                    flat[path] = array if form is None else form.convert(array, spec, sharding(spec))
            if progress is not None:
                progress(done, total)
        params: Tree = {}
        for path, w in flat.items():
            put(params, path, w)
        return params


def _most(count: int) -> int:
    """The largest of the processes' counts."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(count)).max())


def _looks_like(path: Any, names: Collection[str]) -> bool:
    return bool({"orbax.checkpoint", "_CHECKPOINT_METADATA"} & set(names))


def _open(path: Any, files: SmallFiles, specs: Tree, *, tied: bool) -> OrbaxFolder:
    manifest, recorded = Manifest.read(path, files), read_json(path, files, LAYOUT)
    layout = None if recorded is None else Layout.from_json(recorded, str(path / LAYOUT))
    return OrbaxFolder(path, manifest.infos if manifest else None, layout).check(table(specs), orbax_leaves(specs))


FORMAT = Format("orbax", "Orbax", _looks_like, _open, whole_arrays=True)
