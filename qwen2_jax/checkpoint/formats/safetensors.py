# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: a checked header, reads of exactly the bytes asked for, and a header to write.

The layout (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header that maps names
to dtype, shape and byte range, then the tensors, without gaps. No byte of a file is trusted before it is checked.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen2_jax.checkpoint.formats.casting import cast_into
from qwen2_jax.checkpoint.formats.stored_tensor import StoredTensor, TensorInfo
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.json_text import parse_json
from qwen2_jax.validate import short

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PACKED_DTYPES = {  # of what quantised weights are stored in
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
ALL_DTYPES = DTYPES | PACKED_DTYPES
MAX_HEADER_BYTES = 100_000_000  # the bound of the official reader
MAX_SIZE = 2**62
MAX_DIMS = 32
METADATA = "__metadata__"  # key of a header that is no tensor


@dataclasses.dataclass(frozen=True)
class TensorInFile(StoredTensor):
    """A tensor whose bytes are those from byte `start` of `file` on, row-major, little-endian."""

    file: Path
    start: int

    def read_into(self, out: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
        """See StoredTensor. Reads only the bytes of the slice.

        One read where they are consecutive, else a memory map that is closed again, so that no more than this tensor
        is ever resident.
        """
        counts = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        nbytes = math.prod(counts) * self.dtype.itemsize
        if nbytes == 0:
            return 0
        if (
            out.dtype == self.dtype
            and out.flags.c_contiguous
            and (first := _offset_if_consecutive(index, shape)) is not None
        ):
            _read_exactly(self.file, self.start + first * self.dtype.itemsize, out)
        else:
            with self.mapped() as tensor:
                cast_into(out, tensor.reshape(shape)[index])
        return nbytes

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        """The tensor as a read-only view of the file, valid inside the `with` only."""
        if self.nbytes == 0:
            yield np.empty(self.shape, self.dtype)
            return
        skip = self.start % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as f:
            if os.fstat(f.fileno()).st_size < self.start + self.nbytes:  # a page beyond the end would kill the process
                raise CheckpointError(f"{self.file} became shorter while it was read; fetch it again")
            view = mmap.mmap(f.fileno(), self.nbytes + skip, access=mmap.ACCESS_READ, offset=self.start - skip)
        array = np.frombuffer(view, self.dtype, math.prod(self.shape), skip).reshape(self.shape)
        try:
            yield array
        finally:
            del array
            with contextlib.suppress(BufferError):  # an array made from it is still held, by a traceback perhaps
                view.close()


def _offset_if_consecutive(index: tuple[slice, ...], shape: tuple[int, ...]) -> int | None:
    """The first element's offset if the selected elements follow each other in memory, else None."""
    offset, stride, whole = 0, 1, True
    for s, size in zip(reversed(index), reversed(shape), strict=True):
        start, stop, step = s.indices(size)
        if step != 1 or (not whole and stop - start != 1):
            return None
        whole = whole and stop - start == size
        offset += start * stride
        stride *= size
    return offset


def _read_exactly(path: Path, offset: int, out: np.ndarray) -> None:
    rest = memoryview(out.reshape(-1).view(np.uint8))
    with open(path, "rb", buffering=0) as f:
        f.seek(offset)
        while rest:
            n = f.readinto(rest)
            if not n:
                raise CheckpointError(f"{path} became shorter while it was read; fetch it again")
            rest = rest[n:]


@dataclasses.dataclass(frozen=True)
class Header:
    """A checked header: `text` as it stands in the file, the usable tensors, one line for each thing that is wrong, and
    the names of the tensors that these lines are about."""

    text: str
    tensors: Mapping[str, TensorInFile]
    problems: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()


def read_header(path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> Header:
    """Reads and checks the header of one file; never raises for what the file holds, see Header.problems.

    dtypes: those that the file may hold, by their code in the header.

    Checked here: length bound, JSON, names given twice, dtype, shape times item size against the byte range, ranges
    inside the file. The official reader then checks that the ranges cover the file without gap or overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            what = (
                "is shorter than its header" if length <= MAX_HEADER_BYTES else "does not begin like a safetensors file"
            )
            return Header("", {}, (f"{path.name} ({size} bytes) {what}: truncated or not a safetensors file",))
        raw = f.read(length)
    try:
        text = raw.decode()
        found, repeated = header_entries(text, dtypes)
    except (UnicodeDecodeError, CheckpointError) as why:
        return Header("", {}, (f"{path.name} has a header that cannot be read: {_one_line(why)}",))

    tensors, problems, broken = {}, [f"{path.name} holds {name} twice" for name in repeated], set()
    for name, entry in found.items():
        wrong = entry if isinstance(entry, str) else _cut_off(*entry, size - 8 - length)
        if wrong or isinstance(entry, str):
            problems.append(f"{name} in {path.name} {wrong}")
            broken.add(name)
        else:
            info, start = entry
            tensors[name] = TensorInFile(info.dtype, info.shape, path, 8 + length + start)
    if not problems:
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as why:
            problems.append(f"{path.name} is damaged: {_one_line(why)}")
    return Header(text, tensors, tuple(problems), frozenset(broken))


def header_entries(
    text: str, dtypes: Mapping[str, np.dtype] = DTYPES
) -> tuple[dict[str, tuple[TensorInfo, int] | str], list[str]]:
    """Each tensor of a header with its first byte after the header, or what is wrong with it; names given twice.

    Raises CheckpointError for a text that is no header.
    """
    repeated: list[str] = []
    entries = parse_json(text, "the header", CheckpointError, repeated=repeated)
    if not isinstance(entries, dict):
        raise CheckpointError("the header is not a JSON object")
    return {name: _entry(entry, dtypes) for name, entry in entries.items() if name != METADATA}, repeated


def _entry(entry: Any, dtypes: Mapping[str, np.dtype]) -> tuple[TensorInfo, int] | str:
    """What one header entry describes, and its first byte; or what is wrong with it."""
    if not isinstance(entry, dict):
        return f"is described by {type(entry).__name__} instead of an object"
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in dtypes:
        return f"has the dtype {short(code)}; supported: {', '.join(dtypes)}"
    if not (
        isinstance(shape, list) and len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < MAX_SIZE for n in shape)
    ):
        return f"has the shape {short(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"has the data_offsets {short(offsets)}"
    info = TensorInfo(dtypes[code], tuple(shape))
    if info.nbytes != offsets[1] - offsets[0]:
        return f"has {offsets[1] - offsets[0]} bytes; {code} of shape {short(shape)} needs {info.nbytes}"
    return info, offsets[0]


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    few = isinstance(values, list) and len(values) <= MAX_DIMS
    return few and all(type(n) is int and 0 <= n < MAX_SIZE for n in values)


def _cut_off(info: TensorInfo, start: int, data_bytes: int) -> str | None:
    """What is wrong where a tensor ends behind the file's data."""
    missing = start + info.nbytes - data_bytes
    if missing <= 0:
        return None
    return f"is truncated: its last {min(info.nbytes, missing)} of {info.nbytes} bytes are not in the file"


def _one_line(why: Exception) -> str:
    return " ".join(str(why).split())[:200]


def header_text(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> str:
    """The header of a file with these tensors in this order, padded so that the data begin at a multiple of 8 bytes.

    metadata: more texts by key, for a reader who knows the keys.
    """
    codes = {dtype: code for code, dtype in ALL_DTYPES.items()}
    entries: dict[str, Any] = {
        METADATA: {"format": "pt", **(metadata or {})}
    }  # transformers refuses files that do not say it
    start = 0
    for name, info in infos.items():
        entries[name] = {
            "dtype": codes[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, start + info.nbytes],
        }
        start += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a 64-byte boundary, which jax on CPU takes over without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
