# SPDX-License-Identifier: Apache-2.0
"""One tensor of a model as a checkpoint stores it: as it is, or as several tensors that a decoder makes into one.

A model's tensor has the name and shape that it has in Hugging Face's files. A file may hold exactly that
(safetensors.py), a larger tensor that it is a part of, or packed integers with scales and zero points.
Who reads a weight does not see the difference.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from qwen2_jax.checkpoint.formats.casting import cast_into

BLOCK = 1 << 22  # entries that are decoded at a time: 16 MiB of float32


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of one tensor of a model, in Hugging Face's layout ([out, in])."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """How a file stores it, for people: a dtype, or a quantised type such as Q4_K."""
        return self.dtype.name

    @property
    def stored_bytes(self) -> int:
        """What it takes in the file."""
        return self.nbytes


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Integers in groups, as a file has them. size: inputs of a group. bits: 4 or 8. offset: whether there are any."""

    size: int
    bits: int
    offset: bool

    def __or__(self, other: "GroupLayout") -> "GroupLayout":
        """The layout that can hold both."""
        return GroupLayout(math.gcd(self.size, other.size), max(self.bits, other.bits), self.offset or other.offset)


# q int8 [R, I], float32 scale [R, G], offset [R, G] or None: the weight is scale * q - offset
Integers = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor that can be read without reading the others. dtype: the one that `mapped` gives."""

    @property
    def groups(self) -> GroupLayout | None:
        """How the weight can stay in memory as integers; None where only its values can be had."""
        return None

    def read_integers(self, rows: slice) -> Integers:
        """Some rows as integers, with float32 scales and offsets. Only where `groups` is not None."""
        raise NotImplementedError

    def read_into(self, out: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
        """Fills `out` with self.reshape(shape)[index], cast to out's dtype. Returns the number of file bytes asked for.

        Safe to call from several threads. Host memory beside `out` stays below this tensor or a block of it.
        """
        raise NotImplementedError

    def mapped(self) -> contextlib.AbstractContextManager[np.ndarray]:
        """All of the tensor as a read-only array, valid inside the `with` only."""
        raise NotImplementedError


class Decoder(Protocol):
    """Makes a weight from the tensors in which a format stores it. It has the settings: bits, group size, block type.

    row_multiple: rows are decoded in multiples of this (8 where 8 outputs share a word). kind: see TensorInfo.
    """

    @property
    def kind(self) -> str: ...

    @property
    def row_multiple(self) -> int: ...

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout | None:
        """See StoredTensor."""

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        """The rows as integers; see StoredTensor.read_integers."""

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        """The weight's rows [rows.start, rows.stop), in a floating dtype. parts: by the name of their role."""


class NotInGroups:
    """The part of a Decoder whose weights are no integers in groups."""

    def groups(self, parts: Mapping[str, StoredTensor]) -> None:
        return None

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DecodedTensor(StoredTensor):
    """A weight computed from `parts`, such as {"qweight", "scales", "qzeros"}, a block of rows at a time."""

    parts: Mapping[str, StoredTensor]
    decoder: Decoder

    @property
    def groups(self) -> GroupLayout | None:
        return self.decoder.groups(self.parts)

    def read_integers(self, rows: slice) -> Integers:
        return self.decoder.split(self.parts, rows)

    @property
    def kind(self) -> str:
        return self.decoder.kind

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts.values())

    def read_into(self, out: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
        """See StoredTensor. Rows are decoded completely: a slice of columns costs as much as the whole rows."""
        first, last, _ = index[0].indices(shape[0])
        entries, nbytes = math.prod(shape[1:]), 0  # entries in one row of `shape`, which may be several rows of ours
        step = max(1, BLOCK // max(1, entries))
        for start in range(first, last, step):
            stop = min(last, start + step)
            values, read = self._entries(start * entries, stop * entries)
            block = values.reshape(stop - start, *shape[1:])
            cast_into(out[start - first : stop - first], block[(slice(None), *index[1:])])
            nbytes += read
        return nbytes

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        out = np.empty(self.shape, self.dtype)
        self.read_into(out, tuple(slice(0, n) for n in self.shape), self.shape)
        yield out

    def _entries(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        """Entries [start, stop) of the flat tensor, and the file bytes of the rows that they are in."""
        if start == stop:
            return np.empty(0, self.dtype), 0
        width, multiple = math.prod(self.shape[1:]), self.decoder.row_multiple
        rows = slice(
            start // width // multiple * multiple, min(self.shape[0], -(-stop // (width * multiple)) * multiple)
        )
        with np.errstate(all="ignore"):  # scales that are not finite give weights that are not, as they are stored
            values = self.decoder.decode(self.parts, rows).reshape(-1)
        skip = start - rows.start * width
        return values[skip : skip + stop - start], self.stored_bytes * (rows.stop - rows.start) // self.shape[0]
