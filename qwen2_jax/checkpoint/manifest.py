# SPDX-License-Identifier: Apache-2.0
"""manifest.json: a SHA-256 of every tensor and small file, the same in a Hugging Face folder and its Orbax copy.

A tensor's hash is that of its bytes in the Hugging Face file (row-major, little-endian, the file's dtype), whatever the
format on disk, so one manifest follows a checkpoint through conversions.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.formats.protocol import Progress, Tensors
from qwen2_jax.checkpoint.formats.safetensors import CODES, DTYPES
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.small_files import MANIFEST, MAX_BYTES, SmallFiles, read_json, small_file
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.errors import CheckpointError
from qwen2_jax.validate import short

VERSION = 1
UNREADABLE = (CheckpointError, OSError, ValueError)  # what the readers of all formats raise for damaged bytes


def sha256(array: np.ndarray) -> str:
    """Hex digest of the array's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """tensors: (info, digest) by Hugging Face name. files: digest by name."""

    tensors: Mapping[str, tuple[TensorInfo, str]]
    files: Mapping[str, str]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for name, (info, _) in self.tensors.items()}

    def to_bytes(self) -> bytes:
        rows = {
            name: {"dtype": CODES[info.dtype], "shape": list(info.shape), "sha256": digest}
            for name, (info, digest) in self.tensors.items()
        }
        data = {"format": "qwen2_jax manifest", "version": VERSION, "tensors": rows, "files": dict(self.files)}
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, path: Any, files: SmallFiles) -> "Manifest | None":
        """The checkpoint's manifest, None where there is none. Raises CheckpointError for one that cannot be read."""
        data = read_json(path, files, MANIFEST)
        if data is None:
            return None
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"{path / MANIFEST} has version {short(data.get('version'))}; this program reads {VERSION}"
            )
        where = str(path / MANIFEST)
        tensors, digests = data.get("tensors"), data.get("files")
        if not isinstance(tensors, dict) or not isinstance(digests, dict):
            raise CheckpointError(f"{where} is damaged: tensors and files must be objects")
        for name in digests:
            small_file(path, name, where)
        for name, digest in (*digests.items(), *((name, _digest(row)) for name, row in tensors.items())):
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise CheckpointError(f"{where} is damaged: {short(name)} has no SHA-256")
        return cls({name: (_info(row, name, where), row["sha256"]) for name, row in tensors.items()}, digests)


_SHA256 = re.compile("[0-9a-f]{64}")


def _digest(row: Any) -> Any:
    return row.get("sha256") if isinstance(row, dict) else None


def _info(row: dict[str, Any], name: str, where: str) -> TensorInfo:
    code, shape = row.get("dtype"), row.get("shape")
    if code not in tuple(DTYPES) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where} is damaged: {short(name)} has the dtype {short(code)} and shape {short(shape)}")
    return TensorInfo(DTYPES[code], tuple(shape))


class Hasher:
    """Collects digests of tensors while they are written; hashes in a thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[tuple[str, TensorInfo, Future[str]]] = []
        self.tensors: dict[str, tuple[TensorInfo, str]] = {}

    def start(self, name: str, array: np.ndarray) -> None:
        """Begins to hash; the array must stay as it is until `finish`."""
        self._pending.append((name, TensorInfo(array.dtype, array.shape), self._pool.submit(sha256, array)))

    def finish(self) -> None:
        """Waits for everything that was started."""
        for name, info, digest in self._pending:
            self.tensors[name] = (info, digest.result())
        self._pending.clear()


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `verify`.

    damaged: one line per tensor or file that is not what the manifest says. hashed: False where the folder has no
    manifest and only its structure was checked.
    """

    damaged: tuple[str, ...]
    tensors: int
    nbytes: int
    hashed: bool


def compare(
    path: Any, files: SmallFiles, tensors: Tensors, layout: Layout | None, *, progress: Progress | None = None
) -> Report:
    """Reads every tensor of an opened, checked checkpoint and compares it with the checkpoint's manifest."""
    manifest = Manifest.read(path, files)
    total, done, damaged = sum(info.nbytes for info in tensors.infos.values()), 0, []
    if manifest is None:
        return Report((), len(tensors.infos), total, False)
    aliases = layout.aliases if layout is not None else {}
    extras = layout.extras if layout is not None else {}
    known = tensors.infos.keys() | aliases.keys() | extras.keys()
    damaged += [f"{name}: the manifest has no such tensor" for name in sorted(known - manifest.tensors.keys())]
    damaged += [f"{name}: is not in the folder" for name in sorted(manifest.tensors.keys() - known)]
    for name, data in extras.items():
        if name in manifest.tensors and hashlib.sha256(data).hexdigest() != manifest.tensors[name][1]:
            damaged.append(f"{name}: its bytes have changed")
    names = [name for name in tensors.infos if name in manifest.tensors]
    for name, array in readable(tensors, names, damaged):
        info, digest = manifest.tensors[name]
        if (info.dtype, info.shape) != (array.dtype, array.shape):
            damaged.append(
                f"{name}: is {CODES[array.dtype]} {list(array.shape)}, was {CODES[info.dtype]} {list(info.shape)}"
            )
        elif sha256(array) != digest:
            damaged.append(f"{name}: its bytes have changed")
        done += array.nbytes
        if progress is not None:
            progress(done, total)
    for name, digest in manifest.files.items():
        content = files.read_bytes(name, MAX_BYTES)
        if content is None:
            damaged.append(f"{name}: is not in the folder")
        elif hashlib.sha256(content).hexdigest() != digest:
            damaged.append(f"{name}: its bytes have changed")
    return Report(tuple(damaged), len(names), total, True)


def readable(tensors: Tensors, names: Sequence[str], damaged: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """tensors.stream that continues after tensors that cannot be read at all, which are added to `damaged`."""
    rest = list(names)
    while rest:
        try:
            for name, array in tensors.stream(rest):
                rest.remove(name)
                yield name, array
        except UNREADABLE:
            while rest:  # one by one up to the damaged one, since several may be read together
                name = rest.pop(0)
                try:
                    yield from tensors.stream([name])
                except UNREADABLE as why:
                    damaged.append(f"{name}: cannot be read: {' '.join(str(why).split())[:160]}")
                    break
