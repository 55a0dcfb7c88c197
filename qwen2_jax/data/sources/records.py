# SPDX-License-Identifier: Apache-2.0
"""Random access to the records of files, from any thread, with the location of each record for error messages.

A record is a dict. Supported files:

    .jsonl .json              one JSON object per line; blank lines are skipped, a .json file may also be one array
    .txt .md .py              the whole file, as {"text": ...}
    .parquet                  one row
    .array_record             JSON objects or UTF-8 text
    a folder of `datasets`    written by Hugging Face's Dataset.save_to_disk: one row

JSON and text may be compressed (.gz, .zst). A folder or a glob means its files, sorted, all of one kind.
"""

import functools
import glob
import hashlib
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen2_jax.data.sources.files import (
    MARK,
    decode,
    decompressed,
    json_object,
    parse,
    parse_text,
    pieces,
    reading,
    unreadable,
)
from qwen2_jax.data.sources.parquet_arrow import ArrayRecord, Dataset, Parquet, RowGroups
from qwen2_jax.errors import UserError

KINDS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text", ".py": "text",
    ".parquet": "parquet", ".array_record": "array_record",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
META, TOKENS = "meta.json", "tokens.u32"  # a folder with both holds token ids and no records: see store.py
DATASET, SPLITS = "state.json", "dataset_dict.json"  # a folder with one of these was written by Hugging Face's datasets
STEP = 1 << 24  # bytes scanned at once


class Records(Protocol):
    """Indexed records. `fingerprint` is a digest of the files' relative names, sizes and modification times."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def where(self, i: int) -> str:
        """The record's location: "file.jsonl line 7". Lines, rows and items count from 1."""
        ...


def open_records(path: str, cache: Path) -> Records:
    """Records of a file, a folder or a glob; compressed JSON is decompressed once into the folder `cache`.

    This lists the files and takes their fingerprint; they are opened when a record or the length is first needed.
    Raises UserError that names file and line for anything that cannot be read, now or then.
    """
    path = os.path.expanduser(path)
    found = _find(path)
    kinds = {kind: [file for file, k in found.items() if k == kind] for kind in dict.fromkeys(found.values())}
    if len(kinds) > 1:
        listed = "; ".join(
            f"{kind}: {', '.join(files[:3])}{', ...' * (len(files) > 3)}" for kind, files in kinds.items()
        )
        raise UserError(f"{path} mixes kinds of files ({listed}); give one kind, such as '{_of_one_kind(path, kinds)}'")
    ((kind, files),) = kinds.items()
    return _Joined(files, lambda: _open(kind, files, cache))


def _open(kind: str, files: list[str], cache: Path) -> "list[_Part]":
    if kind == "text":
        return [_Texts(files)]
    if kind == "jsonl":
        return [_open_json(file, cache) for file in files]
    if kind == "parquet":
        row_groups = RowGroups()
        return [Parquet(file, row_groups) for file in files]
    if kind == "array_record":
        return [ArrayRecord(file) for file in files]
    return [Dataset(folder) for folder in files]


class _Part(Protocol):
    """The records of one file."""

    def __len__(self) -> int: ...
    def read(self, i: int) -> dict[str, Any]: ...
    def where(self, i: int) -> str: ...


class _Joined:
    """Records of several files, one after the other.

    The fingerprint is taken before any file is opened, so a file that is replaced in between counts as changed at the
    next start.
    """

    def __init__(self, files: Sequence[str], opened: Callable[[], list[_Part]]):
        self.fingerprint = _fingerprint(files)
        self._opened = opened

    @functools.cached_property
    def _parts(self) -> list[_Part]:
        return self._opened()

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(part) for part in self._parts], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        part, at = self._find(i)
        return part.read(at)

    def where(self, i: int) -> str:
        part, at = self._find(i)
        return part.where(at)

    def _find(self, i: int) -> tuple[_Part, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._parts[number], int(i - self._starts[number])


# Which files


def _find(path: str) -> dict[str, str]:
    """File or data set folder -> kind, sorted by name."""
    if path.startswith(("gs://", "s3://", "hf://", "http://", "https://")):
        raise UserError(f"{path} is not on this machine; copy the data to a local folder first")
    if is_store(path):
        raise UserError(f"{path} holds token ids, made by `python -m qwen2_jax.data tokenize`; leave its format out")
    matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder (data on the Hugging Face Hub must be downloaded first)")
    found: dict[str, str] = {}
    for match in matches:
        if not os.path.isdir(match):
            found[match] = _kind(match) or _refuse(match)
        else:
            found |= _walk(match)
    empty = [file for file, kind in found.items() if kind == "text" and _size(file) == 0]
    if len(found) > len(empty):  # an empty text among others, such as Python's __init__.py, is no mistake
        found = {file: kind for file, kind in found.items() if file not in empty}
    for file, kind in found.items():
        if kind != "dataset" and _size(file) == 0:
            raise UserError(f"{file} is empty")
    if not found:
        raise UserError(f"{path} has no data files; known endings: {', '.join(KINDS)}, also with .gz or .zst")
    return found


def _walk(folder: str) -> dict[str, str]:
    """Data files below a folder. Skips hidden files, unknown extensions and folders of token ids."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or is_store(parent):  # a link may form a cycle or lead to a folder visited before
            folders.clear()
            continue
        seen.add(real)
        if SPLITS in files or DATASET in files:
            found[_only_split(parent) if SPLITS in files else parent] = "dataset"
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if (kind := _kind(name)) and not name.startswith("."):
                found[os.path.join(parent, name)] = kind
    return dict(sorted(found.items()))


def is_store(path: str) -> bool:
    """Whether this folder holds token ids written by store.build."""
    return all(os.path.isfile(os.path.join(path, name)) for name in (META, TOKENS))


def _of_one_kind(path: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """A glob for the data files without other texts, such as a README.md."""
    kind = next(kind for kind in kinds if kind != "text")
    file = kinds[kind][0]
    if kind == "dataset":
        return file
    folders = [path] if os.path.isdir(path) else [os.path.dirname(one) for files in kinds.values() for one in files]
    stem, ending = os.path.splitext(file)
    if ending.lower() in COMPRESSED:
        ending = os.path.splitext(stem)[1] + ending
    return os.path.join(glob.escape(os.path.commonpath(folders)), "**", f"*{ending}")


def _only_split(folder: str) -> str:
    splits = sorted(name for name in os.listdir(folder) if os.path.exists(os.path.join(folder, name, DATASET)))
    if len(splits) != 1:
        names = ", ".join(splits) or "none"
        raise UserError(f"{folder} has several splits ({names}); give the folder of one, such as {folder}/train")
    return os.path.join(folder, splits[0])


def _kind(name: str) -> str | None:
    stem, ending = os.path.splitext(name.lower())
    if ending not in COMPRESSED:
        return KINDS.get(ending)
    kind = KINDS.get(os.path.splitext(stem)[1])
    return kind if kind in ("jsonl", "text") else None


def _refuse(file: str) -> str:
    raise UserError(f"{file}: unknown kind of file; known endings: {', '.join(KINDS)}; JSON and text also .gz or .zst")


def _size(file: str) -> int:
    with reading(file):
        return os.stat(file).st_size


def _fingerprint(files: Sequence[str]) -> str:
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    inside = [os.path.join(file, name) for file in files if os.path.isdir(file) for name in sorted(os.listdir(file))]
    digest = hashlib.sha256()
    for file in [*files, *inside]:
        if not os.path.isdir(file):
            status = os.stat(file)
            name = Path(os.path.relpath(file, base)).as_posix()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _raise(error: OSError) -> None:
    raise unreadable(error.filename, error) from error


# Text and JSON


class _Texts:
    """Text files, each one record; compressed ones are decompressed when they are read."""

    def __init__(self, files: list[str]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def where(self, i: int) -> str:
        return self._files[i]

    def read(self, i: int) -> dict[str, Any]:
        data = b"".join(pieces(self._files[i]))
        return {"text": decode(data.removeprefix(MARK), self._files[i])}


class _Lines:
    """The lines of a JSONL file. In memory: where each line starts, 8 bytes."""

    def __init__(self, file: str | Path, name: str):
        self._file, self._name = file, name
        if _size(str(file)) == 0:  # an empty file cannot be mapped
            raise UserError(f"{name} is empty")
        with reading(name), open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._starts, self._numbers = _index(data)
        if not len(self._starts):
            raise UserError(f"{name} has only blank lines")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        return f"{self._name} line {i + 1 if self._numbers is None else self._numbers[i]}"

    def read(self, i: int) -> dict[str, Any]:
        # Opened for each read: threads read concurrently, and many shards would exhaust the file descriptors.
        with reading(self._name), open(self._file, "rb") as opened:
            opened.seek(int(self._starts[i]))
            line = opened.readline()
        return parse(line, self.where(i))


class _Array:
    """A .json file with one array of objects, as for Alpaca and ShareGPT. It is read into memory."""

    def __init__(self, file: str | Path, name: str):
        with reading(name):
            data = Path(file).read_bytes()
        self._records: list[Any] = parse_text(decode(data.removeprefix(MARK), name), name)
        if not self._records:
            raise UserError(f"{name} is an empty list")
        self._name = name

    def __len__(self) -> int:
        return len(self._records)

    def where(self, i: int) -> str:
        return f"{self._name} item {i + 1}"

    def read(self, i: int) -> dict[str, Any]:
        return dict(json_object(self._records[i], self.where(i)))


def _open_json(file: str, cache: Path) -> _Part:
    plain: str | Path = decompressed(file, cache) if file.lower().endswith(COMPRESSED) else file
    if ".json" in (os.path.splitext(name)[1].lower() for name in (file, os.path.splitext(file)[0])):
        with reading(file), open(plain, "rb") as opened:
            if opened.read(1000).removeprefix(MARK).lstrip().startswith(b"["):
                return _Array(plain, file)
    return _Lines(plain, file)


def _index(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray | None]:
    """Start of every line that is not blank, and its number in the file (None: no line is blank)."""
    view = np.frombuffer(data, np.uint8)
    ends = [np.flatnonzero(view[at : at + STEP] == ord("\n")) + at for at in range(0, len(view), STEP)]
    first = len(MARK) if data[: len(MARK)] == MARK else 0
    starts = np.concatenate([[first], *(end + 1 for end in ends)]).astype(np.int64)
    starts = starts[starts < len(view)]
    bounds = np.append(starts, len(view))
    suspects = np.flatnonzero(np.isin(view[starts], np.frombuffer(b" \t\r\n\f\v", np.uint8)))
    blank = [k for k in suspects if not data[bounds[k] : bounds[k + 1]].strip()]
    del view  # or the file could not be closed
    if not blank:
        return starts, None
    kept = np.delete(np.arange(len(starts)), blank)
    return starts[kept], kept + 1
