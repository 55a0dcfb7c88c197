# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: safetensors in one file or in shards with an index, read tensor by tensor."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.file_tensors import FileTensors
from qwen2_jax.checkpoint.formats.names import EMBEDDING, HEAD, Slot, Tree, table
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.safetensors import DTYPES, Header, TensorInFile, read_header
from qwen2_jax.checkpoint.formats.safetensors_layout import (
    BUFFER,
    INDEX,
    MAX_BUFFER_BYTES,
    SINGLE,
    SUFFIX,
    Layout,
    weight_map,
)
from qwen2_jax.checkpoint.formats.small_files import MAX_JSON_BYTES, SmallFiles
from qwen2_jax.checkpoint.formats.stored_tensor import StoredTensor
from qwen2_jax.errors import CheckpointError

BODY = "model."  # in front of the decoder's names
RULE = f"only {SUFFIX} files beside the index are read"


class HfFolder(FileTensors):
    """An opened Hugging Face folder. Raises CheckpointError for a folder without usable weight files.

    After `check`, `infos` holds exactly the tensors of the model; `bytes_read` counts the bytes asked of the files.
    A format that stores weights in other tensors derives from this: `dtypes` are those that its files may hold,
    `weights` makes the model's tensors from the files', and its `layout` is None.
    """

    dtypes: Mapping[str, np.dtype] = DTYPES

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.errors = CollectedErrors(str(path))
        self.index: str | None = None
        self.headers: dict[str, Header] = {}
        self.in_files: dict[str, TensorInFile] = {}
        self.aliases: dict[str, str] = {}
        self.extras: dict[str, StoredTensor] = {}
        files, listed_in = self._files()
        absent = [name for name in files if not (path / name).is_file()]
        self.errors.add("missing files", (f"{n} (an unfinished download? start it again to resume)" for n in absent))
        for name in files:
            if name not in absent:
                header = self.headers[name] = read_header(path / name, self.dtypes)
                self.errors.add("damaged", header.problems)
                for tensor, info in header.tensors.items():
                    if tensor in self.in_files:
                        self.errors.add("given twice", [f"{tensor} in {self.in_files[tensor].file.name} and {name}"])
                    self.in_files[tensor] = info
        if listed_in is not None:
            readable = {name for name in files if name not in absent and not self.headers[name].problems}
            listed = {tensor: file for tensor, file in listed_in.items() if file in readable}
            wrong = (t for t, file in listed.items() if t not in self.headers[file].tensors)
            self.errors.add(f"listed in {INDEX} but not in that file", (f"{t} ({listed_in[t]})" for t in wrong))
            self.errors.add(f"not listed in {INDEX}", (t for t in self.in_files if t not in listed_in))
        self.infos = self.weights(self.in_files)

    def _files(self) -> tuple[list[str], dict[str, str] | None]:
        """(names of the weight files, the index's weight_map if there is one)."""
        if (self.path / SINGLE).is_file():
            return [SINGLE], None
        if (self.path / INDEX).is_file():
            self.index = read_text(self.path / INDEX)
            found = weight_map(self.index, str(self.path / INDEX), RULE)
            return sorted(set(found.values())), found
        files = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no .safetensors file")
        return files, None

    def weights(self, in_files: Mapping[str, TensorInFile]) -> dict[str, StoredTensor]:
        """The model's tensors, and any others, from those of the files; adds to `errors` what does not fit together."""
        return dict(in_files)

    def check(self, table: Mapping[str, Slot], *, tied: bool) -> "HfFolder":
        """Compares the folder with the model's table of names; everything that is wrong is in one CheckpointError.

        A folder of the bare decoder is read too, whose names lack the `model.` in front; `aliases` then has its names.
        """
        if tied and HEAD in self.infos and EMBEDDING in self.infos and HEAD not in table:
            if self._equal(self.infos[HEAD], self.infos[EMBEDDING]):
                self.aliases[HEAD] = EMBEDDING
                del self.infos[HEAD]
            else:
                self.errors.add(
                    "contradiction",
                    [f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config.json"],
                )
        if not any(name.startswith(BODY) for name in self.infos):  # saved from transformers' Qwen2Model, without a head
            prefixed = {name: BODY + name if BODY + name in table else name for name in self.infos}
            self.aliases |= {name: new for name, new in prefixed.items() if new != name}
            self.infos = {prefixed[name]: info for name, info in self.infos.items()}
        for name in [n for n in self.infos if BUFFER.search(n) and n not in table]:
            self.extras[name] = self.infos.pop(name)
        headers = self.headers.values()
        broken = frozenset().union(*(header.broken for header in headers))
        broken |= {BODY + name for name in broken}
        hidden = "missing files" in self.errors.kinds or any(
            h.problems and not h.tensors and not h.broken for h in headers
        )
        have = {name: info.shape for name, info in self.infos.items()}
        # Tensors of an unreadable file are not reported one by one.
        want = {name: slot.shape for name, slot in table.items() if not hidden or name in have}
        self.errors.compare(have, want, broken=broken)
        self.errors.raise_any()
        self.infos = {name: self.infos[name] for name in table}
        return self

    def _equal(self, a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.mapped() as x, b.mapped() as y:
            step = range(0, len(x), rows)
            return all(x[i : i + rows].tobytes() == y[i : i + rows].tobytes() for i in step)

    def layout(self) -> Layout | None:
        """The files as they are, to write them again byte for byte."""
        extras = {}
        for name, info in self.extras.items():
            if info.nbytes > MAX_BUFFER_BYTES:
                file = self.in_files[name].file.name
                raise CheckpointError(
                    f"{name} in {file} has {info.nbytes} bytes; a buffer of rotary frequencies is smaller"
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


def _looks_like(path: Any, names: Collection[str]) -> bool:
    return any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def _open(path: Path, files: SmallFiles, specs: Tree, *, tied: bool) -> HfFolder:
    return HfFolder(path).check(table(specs), tied=tied)


FORMAT = Format("hf", "Hugging Face safetensors", _looks_like, _open)
