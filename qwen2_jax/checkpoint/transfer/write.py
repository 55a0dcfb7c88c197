# SPDX-License-Identifier: Apache-2.0
"""Writing complete checkpoints, by one process or by several that each write some of the tensors into one folder."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.checkpoint.formats import names, orbax_folder
from qwen2_jax.checkpoint.formats.casting import as_dtype, cast_into
from qwen2_jax.checkpoint.formats.names import Leaf, Slot
from qwen2_jax.checkpoint.formats.protocol import ArrayTensors, Progress, Tensors
from qwen2_jax.checkpoint.formats.safetensors import aligned
from qwen2_jax.checkpoint.formats.safetensors_layout import INDEX, RULE, SHARD_BYTES, SUFFIX, Layout, new_layout
from qwen2_jax.checkpoint.formats.small_files import CONFIG, LAYOUT, MANIFEST, small_file
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.manifest import Hasher, Manifest
from qwen2_jax.checkpoint.sources import Source, locate
from qwen2_jax.checkpoint.transfer import multihost
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.files.atomic_folder import write_file
from qwen2_jax.files.path_inside import path_inside
from qwen2_jax.weights.params import Tree, leaves

MARGIN_BYTES = 64 * 2**20  # of disk, for headers, indices and small files


def small_files(
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    origin: str | Path | Source | None,
    *,
    keep_dtype: bool = False,
) -> dict[str, bytes]:
    """The small files of a new folder: those of `origin` as they are, and a config.json that matches the weights."""
    source = None if origin is None else locate(origin)
    files = {} if source is None else {name: source.read_bytes(name) or b"" for name in source.small_files()}
    if not keep_dtype:
        dtypes = {info.dtype.name for info in infos.values()}
        config = dataclasses.replace(config, dtype=dtypes.pop() if len(dtypes) == 1 else config.dtype)
    if source is not None and (data := source.read_json(CONFIG)) is not None:
        there = ModelConfig.from_hf(data)
        if there == config:
            return files
        if dataclasses.replace(there, dtype=config.dtype) == config:
            key = "dtype" if "dtype" in data else "torch_dtype"
            return files | {CONFIG: json_bytes(data | {key: config.dtype})}
    return files | {CONFIG: json_bytes(config.to_hf())}


def json_bytes(data: Mapping) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


class Writing[T: Tensors]:
    """This process's part in writing `tensors`: their order, those that it writes, their hashes, its progress.

    table: of the names. Where several processes run, all of them make this and go through the same steps.
    """

    def __init__(self, tensors: T, table: Mapping[str, Slot], progress: Progress | None):
        dealt = multihost.shares(table, tensors.infos, jax.process_count())
        self.tensors, self.progress = tensors, progress
        self.order = multihost.in_turns(dealt)
        self.mine = frozenset(name for unit in dealt[jax.process_index()] for name in unit)
        self.total = sum(tensors.infos[name].nbytes for name in self.mine)
        self.done = 0
        self.hasher = Hasher()

    def on_tensor(self, name: str, array: np.ndarray) -> Callable[[], None]:
        """Starts hashing. The function returned waits for the hash; call it before the array changes."""
        self.hasher.start(name, array)
        self.done += array.nbytes

        def finish() -> None:
            self.hasher.finish()
            if self.progress is not None:
                self.progress(min(self.done, self.total), self.total)

        return finish

    def manifest(self, files: Mapping[str, bytes], layout: Layout | None) -> Manifest:
        """Of all processes' tensors, of what the Hugging Face form has beside them, and of the small files."""
        infos = self.tensors.infos
        digests = multihost.exchanged(list(infos), {name: digest for name, (_, digest) in self.hasher.tensors.items()})
        tensors = {name: (TensorInfo(info.dtype, info.shape), digests[name]) for name, info in infos.items()}
        if layout is not None:
            for alias, target in layout.aliases.items():
                tensors[alias] = tensors[target]
            for name, data in layout.extras.items():
                (_, _, info), *_ = layout.locations()[name]
                tensors[name] = (info, hashlib.sha256(data).hexdigest())
        return Manifest(tensors, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def write_hf[T: Tensors](
    path: str | Path,
    writing: Writing[T],
    layout: Layout,
    files: Mapping[str, bytes],
    *,
    replace: bool = False,
) -> Path:
    """A Hugging Face folder with the weight files of `layout`, the small files and a manifest."""
    total = sum(info.nbytes for info in writing.tensors.infos.values())
    with multihost.shared_folder(path, total + sum(map(len, files.values())) + MARGIN_BYTES, replace=replace) as folder:
        with multihost.together(f"writing the weights of {path}"):  # before the hashes are exchanged
            write_weights(folder, writing.tensors, layout, writing.on_tensor, order=writing.order, mine=writing.mine)
        _write_files(folder, files, writing.manifest(files, layout))
    return Path(path)


def write_orbax(
    path: str | Path,
    writing: Writing[ArrayTensors],
    specs: Tree,
    layout: Layout | None,
    files: Mapping[str, bytes],
) -> Path:
    """An Orbax folder with the parameters of the unrolled model, the small files and a manifest.

    specs: declarations of the model, stacked. layout: of the Hugging Face files that it came from, to be kept.
    """
    tensors, alone = writing.tensors, jax.process_count() == 1
    unrolled = {tuple(map(str, path)): spec for path, spec in leaves(names.unrolled(specs))}
    dtypes = {
        leaf: np.dtype(jnp.result_type(*(tensors.infos[name].dtype for name in leaf.names)))
        for leaf in names.orbax_leaves(specs)
    }
    sizes = {leaf: int(np.prod(leaf.shape)) * dtype.itemsize for leaf, dtype in dtypes.items()}

    def make(leaf: Leaf) -> jax.Array:
        if not alone:
            spec = dataclasses.replace(unrolled[leaf.path], dtype=dtypes[leaf])
            return tensors.read_array(leaf, spec, multihost.by_hosts(leaf.shape))
        buffer = aligned(leaf.shape, dtypes[leaf])
        parts = buffer.reshape(len(leaf.names), -1)
        for part, (name, array) in zip(parts, tensors.stream(leaf.names), strict=True):
            array = as_dtype(array, tensors.infos[name].dtype)
            finish = writing.on_tensor(name, array)
            cast_into(part, array.reshape(-1))
            finish()
        return jax.device_put(buffer, orbax_folder.host())

    total = sum(sizes.values())
    with multihost.shared_folder(path, total + sum(map(len, files.values())) + MARGIN_BYTES) as folder:
        with multihost.together(f"clearing {folder}"):
            if jax.process_index() == 0:
                folder.rmdir()  # Orbax makes it itself, when all arrays are there
        with multihost.together(f"writing the arrays of {path}"):
            orbax_folder.write(folder, sizes, make, about={"written_by": "qwen2_jax", "tree": "unrolled"})
        if not alone:  # each array was written in parts; the hash of a tensor needs all of it in one place
            with multihost.together(f"hashing what was written to {path}"):
                for name, array in tensors.stream(writing.order, writing.mine):
                    writing.on_tensor(name, as_dtype(array, tensors.infos[name].dtype))()
        if layout is not None:
            files = {**files, LAYOUT: json_bytes(layout.to_json())}
        _write_files(folder, files, writing.manifest(files, layout))
    return Path(path)


def _convert_to_hf(
    path: str | Path,
    writing: Writing[ArrayTensors],
    specs: Tree,
    layout: Layout | None,
    files: Mapping[str, bytes],
    max_shard_bytes: int | None,
) -> Path:
    if layout is None or max_shard_bytes is not None:
        layout = new_layout(writing.tensors.infos, SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    return write_hf(path, writing, layout, files)


def _convert_to_orbax(
    path: str | Path,
    writing: Writing[ArrayTensors],
    specs: Tree,
    layout: Layout | None,
    files: Mapping[str, bytes],
    max_shard_bytes: int | None,
) -> Path:
    return write_orbax(path, writing, specs, layout, files)


# The formats that `convert` writes: (new folder, what to write, the model's declarations, the layout of the safetensors
# files that the tensors come from if it is known, the small files, largest weight file if it was given) -> the folder.
WRITERS: dict[str, Callable[..., Path]] = {"hf": _convert_to_hf, "orbax": _convert_to_orbax}


def write_weights(
    folder: Path,
    tensors: Tensors,
    layout: Layout,
    on_tensor: Callable[[str, np.ndarray], Callable[[], None]],
    *,
    order: Sequence[str] | None = None,
    mine: Container[str] | None = None,
) -> None:
    """Writes the weight files of `layout` into an existing folder, one tensor in memory at a time.

    on_tensor is called with each name and the array before it is written, and what it returned afterwards. order: of
    the names, default as they come. mine: those that this process writes, into files that the first process lays out;
    default all. Raises OSError when the disk is full: the caller owns the folder and removes it.
    """
    locations = layout.locations()
    files = {}
    problem = None
    try:
        with multihost.together(f"laying out {folder}"):
            if jax.process_index() == 0:
                _lay_out(folder, layout, locations)
        for name in layout.headers:
            path = path_inside(folder, name, "the layout", RULE, suffix=SUFFIX, writing=True)
            files[name] = open(path, "r+b", buffering=0)  # noqa: SIM115  all stay open: tensors come in any order
        for name, array in tensors.stream(list(tensors.infos) if order is None else order, mine):
            if problem is not None:
                continue
            try:
                array = as_dtype(array, locations[name][0][2].dtype)
                finish = on_tensor(name, array)
                for file, start, _ in locations[name]:
                    files[file].seek(start)
                    write_all(files[file], [np.ascontiguousarray(array).reshape(-1).view(np.uint8)])
                finish()
            except OSError as why:
                if jax.process_count() == 1:
                    raise
                problem = why  # the other processes still need this one's parts of the remaining tensors
        if problem is not None:
            raise problem
        for f in files.values():
            os.fsync(f.fileno())
    finally:
        for f in files.values():
            f.close()


def _lay_out(folder: Path, layout: Layout, locations: Mapping[str, list[tuple[str, int, TensorInfo]]]) -> None:
    """Creates the files in their full size with headers, non-parameter tensors and the index; parameters come later."""
    for name, text in layout.headers.items():
        raw = text.encode()
        inside = [(start, info) for found in locations.values() for file, start, info in found if file == name]
        path = path_inside(folder, name, "the layout", RULE, suffix=SUFFIX, writing=True)
        with open(path, "xb", buffering=0) as f:
            write_all(f, [len(raw).to_bytes(8, "little"), raw])
            f.truncate(max((start + info.nbytes for start, info in inside), default=8 + len(raw)))
            for extra, data in layout.extras.items():
                for file, start, _ in locations[extra]:
                    if file == name:
                        f.seek(start)
                        write_all(f, [data])
    if layout.index is not None:
        write_file(folder / INDEX, layout.index.encode())


def _write_files(folder: Path, files: Mapping[str, bytes], manifest: Manifest) -> None:
    """The small files, and last of all the manifest."""
    if jax.process_index() == 0:
        for name, data in files.items():
            write_file(small_file(folder, name, "the checkpoint", writing=True), data)
        write_file(folder / MANIFEST, manifest.to_bytes())


def write_all(file, parts: Iterable) -> None:
    """Writes every byte: a raw file may write less than asked, at most 2 GiB at a time on Linux."""
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[file.write(rest) :]
