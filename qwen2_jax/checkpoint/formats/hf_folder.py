# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: safetensors in one file or in shards with an index, read tensor by tensor."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen2_jax.checkpoint.formats.casting import cast_into
from qwen2_jax.checkpoint.formats.collected_errors import Problems
from qwen2_jax.checkpoint.formats.names import EMBEDDING, HEAD, Slot
from qwen2_jax.checkpoint.formats.safetensors import (
    DTYPES,
    Header,
    TensorInFile,
    TensorInfo,
    header_text,
    read_header,
)
from qwen2_jax.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.inv_freq$"
)  # older transformers saved this buffer; it is computed, not learnt
MAX_JSON_BYTES = 100_000_000
MAX_EXTRA_BYTES = 1_000_000
SHARD_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)


class Tensors(Protocol):
    """What yields the tensors of a Hugging Face folder by name: such a folder, an Orbax folder, a tree of arrays."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """dtype and shape by name."""

    def stream(self, names: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) for each of `names`, in any order; an array is valid until the next one is asked for.

        mine: only these are yielded. Where several processes run, all of them ask for the same names in the same order
        and go through to the end, each with its own `mine`: they may have to bring parts of the others' tensors.
        """


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors are spread over files, kept so that the same files can be written again.

    headers: header text by file name. index: text of the index, None for a single file. aliases: names that repeat
    another tensor (a tied head that is stored all the same). extras: bytes of harmless tensors that are no parameter.
    """

    headers: Mapping[str, str]
    index: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"extras": {name: data.hex() for name, data in self.extras.items()}}

    @classmethod
    def from_json(cls, data: dict) -> "Layout":
        return cls(**data | {"extras": {name: bytes.fromhex(text) for name, text in data["extras"].items()}})

    def places(self) -> dict[str, list[tuple[str, int, TensorInfo]]]:
        """For each tensor name (aliases under the name they repeat) where it goes: (file, first byte, info)."""
        out: dict[str, list[tuple[str, int, TensorInfo]]] = {}
        for file, text in self.headers.items():
            base = 8 + len(text.encode())
            for name, entry in json.loads(text).items():
                if name != "__metadata__":
                    info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                    place = (file, base + entry["data_offsets"][0], info)
                    out.setdefault(self.aliases.get(name, name), []).append(place)
        return out

    def serves(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether exactly these tensors, with these dtypes and shapes, fit the recorded files."""
        found = {
            n: {(p[2].dtype, p[2].shape) for p in places} for n, places in self.places().items() if n not in self.extras
        }
        return found == {name: {(info.dtype, info.shape)} for name, info in infos.items()}


class HfFolder:
    """An opened Hugging Face folder. Raises CheckpointError for a folder without usable weight files.

    After `check`, `infos` holds exactly the tensors of the model; `bytes_read` counts the bytes asked of the files.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problems = Problems(str(path))
        self.bytes_read = 0
        self.index: str | None = None
        self.headers: dict[str, Header] = {}
        self.infos: dict[str, TensorInFile] = {}
        self.aliases: dict[str, str] = {}
        self.extras: dict[str, TensorInFile] = {}
        files, weight_map = self._files()
        absent = [name for name in files if not (path / name).is_file()]
        self.problems.add("missing files", (f"{n} (an unfinished download? start it again to resume)" for n in absent))
        for name in files:
            if name not in absent:
                header = self.headers[name] = read_header(path / name)
                self.problems.add("damaged", header.problems)
                for tensor, info in header.tensors.items():
                    if tensor in self.infos:
                        self.problems.add("given twice", [f"{tensor} in {self.infos[tensor].file.name} and {name}"])
                    self.infos[tensor] = info
        if weight_map is not None:
            readable = {name for name in files if name not in absent and not self.headers[name].problems}
            listed = {tensor: file for tensor, file in weight_map.items() if file in readable}
            wrong = (t for t, file in listed.items() if t not in self.headers[file].tensors)
            self.problems.add(f"listed in {INDEX} but not in that file", (f"{t} ({weight_map[t]})" for t in wrong))
            self.problems.add(f"not listed in {INDEX}", (t for t in self.infos if t not in weight_map))

    def _files(self) -> tuple[list[str], dict[str, str] | None]:
        """(names of the weight files, the index's weight_map if there is one)."""
        if (self.path / SINGLE).is_file():
            return [SINGLE], None
        if (self.path / INDEX).is_file():
            self.index = read_text(self.path / INDEX)
            try:
                weight_map = json.loads(self.index)["weight_map"]
            except (ValueError, KeyError, TypeError, RecursionError) as why:
                raise CheckpointError(f"{self.path / INDEX} is not an index with a weight_map: {why!r}") from None
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{self.path / INDEX}: weight_map must map tensor names to file names")
            for file in set(weight_map.values()):
                if (
                    file != os.path.basename(file)
                    or file in ("", ".", "..")
                    or "\\" in file
                    or not file.endswith(".safetensors")
                ):
                    raise CheckpointError(
                        f"{self.path / INDEX} names {file!r}; only .safetensors files beside the index are read"
                    )
            return sorted(set(weight_map.values())), weight_map
        files = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no .safetensors file")
        return files, None

    def check(self, table: Mapping[str, Slot], *, tied: bool) -> "HfFolder":
        """Holds the folder against the model's table of names; everything that is wrong is in one CheckpointError."""
        if tied and HEAD in self.infos and EMBEDDING in self.infos and HEAD not in table:
            if self._equal(self.infos[HEAD], self.infos[EMBEDDING]):
                self.aliases[HEAD] = EMBEDDING
                del self.infos[HEAD]
            else:
                self.problems.add(
                    "contradiction",
                    [f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config.json"],
                )
        for name in [n for n in self.infos if HARMLESS.search(n) and n not in table]:
            self.extras[name] = self.infos.pop(name)
        headers = self.headers.values()
        broken = frozenset().union(*(header.broken for header in headers))
        hidden = "missing files" in self.problems.kinds or any(
            h.problems and not h.tensors and not h.broken for h in headers
        )
        have = {name: info.shape for name, info in self.infos.items()}
        want = {name: slot.shape for name, slot in table.items() if not hidden or name in have}
        self.problems.compare(have, want, broken=broken)  # tensors of an unreadable file are not reported one by one
        self.problems.raise_any()
        self.infos = {name: self.infos[name] for name in table}
        return self

    def _equal(self, a: TensorInFile, b: TensorInFile, rows: int = 4096) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.mapped() as x, b.mapped() as y:
            step = range(0, len(x), rows)
            return all(x[i : i + rows].tobytes() == y[i : i + rows].tobytes() for i in step)

    def stream(self, names: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            if mine is None or name in mine:
                self.bytes_read += self.infos[name].nbytes
                with self.infos[name].mapped() as array:
                    yield name, array

    def layout(self) -> Layout:
        """The files as they are, to write them again byte for byte."""
        extras = {}
        for name, info in self.extras.items():
            if info.nbytes > MAX_EXTRA_BYTES:
                raise CheckpointError(
                    f"{name} in {info.file.name} has {info.nbytes} bytes; a buffer of rotary frequencies is smaller"
                )
            with info.mapped() as array:
                extras[name] = array.tobytes()
        return Layout({name: h.text for name, h in self.headers.items()}, self.index, dict(self.aliases), extras)


def read_text(path: Path) -> str:
    """The text of a JSON file that came from outside: bounded in size, valid UTF-8."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; no such file is larger than {MAX_JSON_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as why:
        raise CheckpointError(f"{path} is not UTF-8 text: {why}") from None


def new_layout(infos: Mapping[str, TensorInfo], max_shard_bytes: int = SHARD_BYTES) -> Layout:
    """Spreads tensors over files of at most max_shard_bytes (a larger tensor gets its own), named as the Hub's are."""
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in infos.items():
        if shards[-1] and info.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = info
        room -= info.nbytes
    # Wide items first, so that each tensor begins at a multiple of its item size.
    texts = [header_text(dict(sorted(s.items(), key=lambda kv: -kv[1].dtype.itemsize))) for s in shards]
    if len(shards) == 1:
        return Layout({SINGLE: texts[0]})
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return Layout(dict(zip(files, texts, strict=True)), json.dumps(index, indent=2) + "\n")


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array itself, or a cast copy."""
    if array.dtype == dtype:
        return array
    out = np.empty(array.shape, dtype)
    cast_into(out, array)
    return out
