# SPDX-License-Identifier: Apache-2.0
"""The bounded reader of one GGUF file: its metadata and where its tensors are. No number in a file is trusted.

The layout (docs/gguf.md of ggml): "GGUF", version, counts, key-value pairs, tensor descriptions, then the tensors at
multiples of `general.alignment`. Every count and length is compared with the bytes that are left before it is used;
nothing is allocated from it.
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.formats.gguf_blocks import BLOCKS, PLAIN, REFUSED
from qwen2_jax.checkpoint.formats.safetensors import DTYPES, TensorInFile
from qwen2_jax.errors import CheckpointError

MAGIC = b"GGUF"
NUMBERS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
MAX_ALIGNMENT = 2**16
MAX_DIMS = 4
MAX_NAME = 200  # characters of a key or of a tensor's name; llama.cpp's have up to 63


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file describes it. shape: as in numpy, [out, in]. stored: its bytes, as rows of blocks."""

    type_id: int
    shape: tuple[int, ...]
    stored: TensorInFile

    @property
    def type_name(self) -> str:
        return PLAIN.get(self.type_id) or BLOCKS[self.type_id].name


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """One file. metadata: numbers, strings, lists of strings, arrays of numbers."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads what stands before the tensors; the last few files are kept as long as they do not change.

    Raises:
        CheckpointError: the file is damaged, of a version or type that is not read, or holds less than it says.
    """
    about = path.stat()
    return _read(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # config, tokenizer and weights are asked for one after the other
def _read(path: Path, size: int, _changed: int) -> GgufFile:
    with open(path, "rb") as f:
        if f.read(4) != MAGIC:
            raise CheckpointError(f"{path} does not begin with GGUF: not such a file, or a damaged one")
        with mmap.mmap(f.fileno(), os.fstat(f.fileno()).st_size, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(path, data).file()
            except struct.error:
                raise CheckpointError(f"{path} ends before its tensors are described; fetch it again") from None
            except UnicodeDecodeError as why:
                raise CheckpointError(f"{path} cannot be read: it has text that is not UTF-8 ({why.reason})") from None


class _Cursor:
    """Reads values one after the other from the bytes of a file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.at = path, data, len(data), 4

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read: {what}")

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A count of items that take at least so many bytes each."""
        n = self.number("Q")
        if n > (self.size - self.at) // least_bytes:
            raise self.damaged(f"{what} is {n}, and only {self.size - self.at} bytes are left (is the file cut off?)")
        return n

    def string(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def name(self, what: str) -> str:
        text = self.string(what)
        if not text or len(text) > MAX_NAME or not text.isprintable():
            raise self.damaged(f"{what} is {text[:40]!r}; 1 to {MAX_NAME} printable characters are read")
        return text

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind == BOOL:
            return bool(self.number("B"))
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind], 1)[0].item()
        if kind != ARRAY:
            raise self.damaged(f"the value of {key} has the type {kind}, which does not exist")
        kind = self.number("I")
        if kind == STRING:
            return [self.string(key) for _ in range(self.count(f"the number of items in {key}", 8))]
        if kind not in NUMBERS and kind != BOOL:
            raise self.damaged(f"{key} is an array of type {kind}; strings, numbers and booleans are read")
        code = NUMBERS.get(kind, "u1")
        return self._numbers(code, self.count(f"the number of items in {key}", np.dtype(code).itemsize))

    def _numbers(self, code: str, count: int) -> np.ndarray:
        dtype = np.dtype(code)
        if count * dtype.itemsize > self.size - self.at:
            raise self.damaged("it ends within a number")
        values = np.frombuffer(self.data[self.at : self.at + count * dtype.itemsize], dtype)
        self.at += values.nbytes
        return values

    def file(self) -> GgufFile:
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise self.damaged(f"it is of a big-endian machine (version {version:#x}); convert it to little-endian")
        if version not in (2, 3):
            raise self.damaged(f"it is of GGUF version {version}; versions 2 and 3 are read")
        n_tensors = self.count("the number of tensors", 24)
        metadata: dict[str, Any] = {}
        for _ in range(self.count("the number of keys", 13)):
            key = self.name("a key")
            if key in metadata:
                raise self.damaged(f"the key {key} is given twice")
            metadata[key] = self.value(key, self.number("I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not (1 <= alignment <= MAX_ALIGNMENT) or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}; it must be a power of two up to {MAX_ALIGNMENT}")
        described = [self._description() for _ in range(n_tensors)]
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, type_id, shape, offset in described:
            if name in tensors:
                raise self.damaged(f"the tensor {name} is given twice")
            tensors[name] = self._tensor(name, type_id, shape, start, offset, alignment)
        self._check_overlap(tensors)
        return GgufFile(self.path, metadata, tensors)

    def _description(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.name("a tensor's name")
        dims = self.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.damaged(f"{name} has {dims} dimensions; 1 to {MAX_DIMS} are read")
        shape = tuple(reversed([self.number("Q") for _ in range(dims)]))
        type_id, offset = self.number("I"), self.number("Q")
        if min(shape) < 1 or max(shape) >= 2**62:
            raise self.damaged(f"{name} has the shape {list(shape)}")
        return name, type_id, shape, offset

    def _tensor(self, name: str, type_id: int, shape, start: int, offset: int, alignment: int) -> GgufTensor:
        dtype, row_bytes = self._row(name, type_id, shape[-1])
        rows = math.prod(shape[:-1])
        if offset % alignment:
            raise self.damaged(f"{name} begins at {offset}, no multiple of the alignment {alignment}")
        if start + offset + rows * row_bytes > self.size:
            raise self.damaged(
                f"{name} needs {rows * row_bytes} bytes from {start + offset} on, and the file has {self.size} (a part "
                "of a file that was split, or an unfinished download?)"
            )
        stored = TensorInFile(dtype, (*shape[:-1], row_bytes // dtype.itemsize), self.path, start + offset)
        return GgufTensor(type_id, shape, stored)

    def _row(self, name: str, type_id: int, width: int) -> tuple[np.dtype, int]:
        """(dtype in which the bytes of a row are read, how many bytes a row has)."""
        if type_id in PLAIN:
            dtype = DTYPES[PLAIN[type_id]]
            return dtype, width * dtype.itemsize
        if type_id not in BLOCKS:
            supported = ", ".join([*PLAIN.values(), *(block.name for block in BLOCKS.values())])
            raise self.damaged(f"{name} has the type {REFUSED.get(type_id, type_id)}; supported: {supported}")
        block = BLOCKS[type_id]
        if width % block.weights:
            raise self.damaged(f"{name} has rows of {width}, no whole blocks of {block.weights} ({block.name})")
        return np.dtype(np.uint8), width // block.weights * block.nbytes

    def _check_overlap(self, tensors: Mapping[str, GgufTensor]) -> None:
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].stored.start):
            if tensor.stored.start < end:
                raise self.damaged(f"the bytes of {name} and {before} overlap")
            end, before = tensor.stored.start + tensor.stored.nbytes, name
