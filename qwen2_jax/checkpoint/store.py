# SPDX-License-Identifier: Apache-2.0
"""Opening, saving and converting whole checkpoints: weights, config, tokenizer files, generation settings, manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen2_jax.checkpoint import fill, hf, names
from qwen2_jax.checkpoint.casting import cast_into
from qwen2_jax.checkpoint.hf import SHARD_BYTES, HfFolder, Layout, Progress, Tensors, as_dtype
from qwen2_jax.checkpoint.manifest import Hasher, Manifest, Report, compare
from qwen2_jax.checkpoint.names import Leaf, Tree
from qwen2_jax.checkpoint.places import CONFIG, LAYOUT, MANIFEST, Source, locate, read_config
from qwen2_jax.checkpoint.tensorfile import CODES, CheckpointError, TensorInfo, aligned
from qwen2_jax.checkpoint.workspace import new_folder, write_file
from qwen2_jax.config import DTYPES, ModelConfig
from qwen2_jax.model import declare
from qwen2_jax.params import count, leaves
from qwen2_jax.sharding import RULES

if TYPE_CHECKING:  # Orbax takes a second to import, and most runs do without it
    from qwen2_jax.checkpoint.orbax import OrbaxFolder

FORMATS = ("hf", "orbax")
MARGIN_BYTES = 64 * 2**20  # of disk, for headers, indices and small files


class TreeTensors:
    """Parameters in memory, stacked or unrolled and on any devices, as the tensors of a Hugging Face folder."""

    def __init__(self, config: ModelConfig, params: Tree):
        self.params = params
        self.specs = _specs_like(config, params)
        self.table = names.table(self.specs)
        shapes = {name: slot.shape for name, slot in self.table.items()}
        self.infos = {
            n: TensorInfo(np.dtype(names.get(params, self.table[n].path).dtype), shapes[n]) for n in self.table
        }
        for name, info in self.infos.items():
            if info.dtype not in CODES:
                raise CheckpointError(
                    f"{name} is {info.dtype}; a checkpoint holds {', '.join(DTYPES)}: cast the parameters first"
                )

    def stream(self, wanted: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        at: tuple | None = None
        array = np.empty(0)
        for name in wanted:
            slot = self.table[name]
            if at != (slot.path, slot.repeat):  # experts of one layer come over together
                at, param = (slot.path, slot.repeat), names.get(self.params, slot.path)
                array = _on_host(param if slot.repeat is None else param[slot.repeat])
            yield name, (array if slot.expert is None else array[slot.expert]).reshape(slot.shape)


def _specs_like(config: ModelConfig, params: Tree) -> Tree:
    """The declarations that these parameters follow: stacked or unrolled."""
    stacked = declare(config)[1]
    have = {path: tuple(value.shape) for path, value in leaves(params)}
    candidates = (stacked, names.unrolled(stacked))
    for specs in candidates:
        if have == {path: spec.shape for path, spec in leaves(specs)}:
            return specs
    want = {path: spec.shape for path, spec in leaves(candidates[0])}
    wrong = sorted(
        ".".join(map(str, path)) for path in have.keys() ^ want.keys() or {p for p in want if have[p] != want[p]}
    )
    raise CheckpointError(
        f"the parameters do not fit the config: {', '.join(wrong[:10])}" + (" ..." if len(wrong) > 10 else "")
    )


@dataclasses.dataclass(frozen=True)
class Recast:
    """Tensors that are to be written in another dtype; the writer casts."""

    tensors: Tensors
    infos: Mapping[str, TensorInfo]

    def stream(self, wanted: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        return self.tensors.stream(wanted)


def _recast(tensors: Tensors, dtype: str) -> Recast:
    return Recast(tensors, {name: TensorInfo(jnp.dtype(dtype), info.shape) for name, info in tensors.infos.items()})


def by_first_process(write: Callable[[], None], tensors: Tensors) -> None:
    """The first process writes tensors whose parts several processes hold: the others bring theirs, in its order."""
    if jax.process_index() == 0:
        write()
    else:
        for _ in tensors.stream(list(tensors.infos)):
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint: written")


def _on_host(array) -> np.ndarray:
    """All of an array. Where its parts are on several hosts, all of them ask for it at the same time."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checked checkpoint. layout: how the Hugging Face files were, where that is known. leaves: of its Orbax form."""

    source: Source
    config: ModelConfig
    specs: Tree
    tensors: "HfFolder | OrbaxFolder"
    layout: Layout | None
    leaves: tuple[Leaf, ...]


def open_checkpoint(name: str | Path | Source, config: ModelConfig | None = None) -> Opened:
    """Opens a checkpoint and holds its names, shapes and dtypes against its config; reads no weights.

    Raises CheckpointError that lists everything missing, unexpected, misshapen, truncated or of an unsupported dtype.
    """
    source = locate(name)
    config = config or read_config(source)
    specs = declare(config)[1]
    table, wanted = names.table(specs), tuple(names.orbax_leaves(specs))
    if source.kind == "hf":
        folder = HfFolder(source.path).check(table, tied=config.tie_word_embeddings)
        return Opened(source, config, specs, folder, folder.layout(), wanted)
    from qwen2_jax.checkpoint.orbax import OrbaxFolder

    manifest = Manifest.read(source)
    tensors = OrbaxFolder(source.path, manifest.infos if manifest else None).check(table, wanted)
    recorded = source.read_json(LAYOUT)
    try:
        layout = None if recorded is None else Layout.from_json(recorded)
    except (KeyError, TypeError, ValueError) as why:
        raise CheckpointError(
            f"{source.path / LAYOUT} is damaged ({why!r}); remove it to have the files laid out anew"
        ) from None
    return Opened(source, config, specs, tensors, layout, wanted)


def load_params(
    source: str | Path | Source,
    config: ModelConfig | None = None,
    *,
    dtype=None,
    unroll: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping = RULES,
    progress: Progress | None = None,
) -> Tree:
    """The parameters of a checkpoint as a nested dict of arrays, born sharded: each device gets only its own bytes.

    dtype: of all parameters, e.g. "bfloat16"; default: the config's. unroll: one array per layer. mesh: devices to
    spread over by `rules` (of qwen2_jax.sharding: RULES to train, SERVING to generate); default: the first device.
    progress(bytes done, bytes in all).
    """
    opened = open_checkpoint(source, config)
    wanted = jnp.dtype(dtype or opened.config.dtype)
    specs = names.unrolled(opened.specs) if unroll else opened.specs
    specs = names.nested({path: dataclasses.replace(spec, dtype=wanted) for path, spec in leaves(specs)})
    place = fill.places(mesh, rules)
    if isinstance(opened.tensors, HfFolder):
        return fill.read_params(opened.tensors, specs, place, progress=progress)
    return opened.tensors.read_params(specs, place, progress=progress)


def model_bytes(source: str | Path | Source | ModelConfig, dtype=None) -> int:
    """Bytes the parameters will take on the devices, known before any weight is read. dtype: default the config's."""
    config = source if isinstance(source, ModelConfig) else read_config(locate(source))
    return count(declare(config)[1]) * jnp.dtype(dtype or config.dtype).itemsize


def save_hf(
    path: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    dtype: str | None = None,
    tokenizer_files_from: str | Path | Source | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a Hugging Face folder that transformers loads, one tensor at a time. Returns its path.

    params: stacked or unrolled, on any devices. dtype: to write them in, one layer cast at a time; default: their own.
    tokenizer_files_from: a checkpoint whose tokenizer, generation settings and other small files are copied.
    max_shard_bytes: size above which weights go to a new file. replace: a folder that is there gives its place to the
    new one when that is complete. Where several processes run, all of them call this and the first one writes.
    """
    tensors: Tensors = TreeTensors(config, params)
    if dtype is not None:
        tensors = _recast(tensors, dtype)

    def first() -> None:
        files = _files(config, tensors.infos, tokenizer_files_from)
        layout = hf.new_layout(tensors.infos, max_shard_bytes)
        _write_hf(path, tensors, layout, files, progress, replace=replace)

    by_first_process(first, tensors)
    return Path(path)


def save_orbax(
    path: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    tokenizer_files_from: str | Path | Source | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes an Orbax folder (see checkpoint/orbax.py) with config, tokenizer files and manifest. Returns its path."""
    tensors = TreeTensors(config, params)
    files = _files(config, tensors.infos, tokenizer_files_from)
    return _write_orbax(path, tensors, names.orbax_leaves(tensors.specs), None, files, progress)


def convert(
    src: str | Path | Source,
    dst: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Copies a checkpoint into the other format, or the same one in another dtype, holding one array at a time.

    Without dtype every tensor keeps its own, and a folder that was converted from Hugging Face format is written back
    with the very same files, unless max_shard_bytes asks for other ones (default 5 GB where they are not known).
    Raises CheckpointError for a source that cannot be used and a `dst` that exists.
    """
    if to not in FORMATS:
        raise CheckpointError(f"to is {to!r}; choose from {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    source = locate(src)
    if isinstance(source.path, Path) and Path(dst).expanduser().resolve() == source.path.resolve():
        raise CheckpointError(f"{dst} is the source itself; choose a new folder")
    opened = open_checkpoint(source)
    tensors: Tensors = opened.tensors
    layout, config = opened.layout, opened.config
    if dtype is not None:
        tensors, layout, config = _recast(tensors, dtype), None, dataclasses.replace(config, dtype=dtype)
    if layout is not None and not layout.serves(tensors.infos):
        layout = None  # the weights were changed since
    files = _files(config, tensors.infos, source, keep_dtype=dtype is None)
    if to == "orbax":
        return _write_orbax(dst, tensors, opened.leaves, layout, files, progress)
    if layout is None or max_shard_bytes is not None:
        layout = hf.new_layout(tensors.infos, SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    return _write_hf(dst, tensors, layout, files, progress)


def verify(name: str | Path | Source, *, progress: Progress | None = None) -> Report:
    """Reads a whole checkpoint and compares every tensor and file with its manifest; checks the structure anyway."""
    opened = open_checkpoint(name)
    return compare(opened.source, opened.tensors, opened.layout, progress=progress)


def _files(
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    origin: str | Path | Source | None,
    *,
    keep_dtype: bool = False,
) -> dict[str, bytes]:
    """The small files of a new folder: those of `origin` as they are, and a config.json true of the weights."""
    source = None if origin is None else locate(origin)
    files = {} if source is None else {name: source.read_bytes(name) or b"" for name in source.travellers()}
    if not keep_dtype:
        dtypes = {info.dtype.name for info in infos.values()}
        config = dataclasses.replace(config, dtype=dtypes.pop() if len(dtypes) == 1 else config.dtype)
    if source is not None and (data := source.read_json(CONFIG)) is not None:
        there = ModelConfig.from_hf(data)
        if there == config:
            return files
        if dataclasses.replace(there, dtype=config.dtype) == config:
            key = "dtype" if "dtype" in data else "torch_dtype"
            return files | {CONFIG: _json(data | {key: config.dtype})}
    return files | {CONFIG: _json(config.to_hf())}


def _json(data: Mapping) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _write_hf(
    path,
    tensors: Tensors,
    layout: Layout,
    files: Mapping[str, bytes],
    progress: Progress | None,
    *,
    replace: bool = False,
) -> Path:
    total = sum(info.nbytes for info in tensors.infos.values())
    hasher, done = Hasher(), 0

    def writing(name: str, array: np.ndarray) -> Callable[[], None]:
        nonlocal done
        done += array.nbytes
        hasher.start(name, array)
        return written

    def written() -> None:
        hasher.finish()
        if progress is not None:
            progress(min(done, total), total)

    with new_folder(path, total + sum(map(len, files.values())) + MARGIN_BYTES, replace=replace) as folder:
        hf.write(folder, tensors, layout, writing)
        _write_files(folder, files, hasher)
    return Path(path)


def _write_orbax(
    path,
    tensors: Tensors,
    wanted: Sequence[Leaf],
    layout: Layout | None,
    files: Mapping[str, bytes],
    progress: Progress | None,
) -> Path:
    from qwen2_jax.checkpoint import orbax

    dtypes = {leaf: np.dtype(jnp.result_type(*(tensors.infos[name].dtype for name in leaf.names))) for leaf in wanted}
    sizes = {leaf: int(np.prod(leaf.shape)) * dtype.itemsize for leaf, dtype in dtypes.items()}
    total, done, hasher = sum(sizes.values()), 0, Hasher()

    def make(leaf: Leaf) -> jax.Array:
        nonlocal done
        buffer = aligned(leaf.shape, dtypes[leaf])
        parts = buffer.reshape(len(leaf.names), -1)
        for part, (name, array) in zip(parts, tensors.stream(leaf.names), strict=True):
            array = as_dtype(array, tensors.infos[name].dtype)
            hasher.start(name, array)
            cast_into(part, array.reshape(-1))
            hasher.finish()
        done += sizes[leaf]
        if progress is not None:
            progress(done, total)
        return jax.device_put(buffer, orbax.host())

    with new_folder(path, total + sum(map(len, files.values())) + MARGIN_BYTES) as folder:
        folder.rmdir()  # Orbax makes it itself, when all arrays are there
        orbax.write(folder, sizes, make, about={"written_by": "qwen2_jax", "tree": "unrolled"})
        if layout is not None:
            files = {**files, LAYOUT: _json(layout.to_json())}
        _write_files(folder, files, hasher, layout)
    return Path(path)


def _write_files(folder: Path, files: Mapping[str, bytes], hasher: Hasher, layout: Layout | None = None) -> None:
    """The small files, and last of all the manifest."""
    for name, data in files.items():
        write_file(folder / name, data)
    tensors = dict(hasher.tensors)
    if layout is not None:  # what the Hugging Face form has beside the model's tensors
        for alias, target in layout.aliases.items():
            tensors[alias] = tensors[target]
        for name, data in layout.extras.items():
            (_, _, info), *_ = layout.places()[name]
            tensors[name] = (info, hashlib.sha256(data).hexdigest())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_file(folder / MANIFEST, Manifest(tensors, digests).to_bytes())
