# SPDX-License-Identifier: Apache-2.0
"""Records read through libraries: Parquet files, Hugging Face datasets, ArrayRecord files."""

import collections
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen2_jax.data.sources.files import decode, first_line, library, parse, reading, unreadable
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json

ROW_GROUPS = 4  # of Parquet files, kept in memory


class TableRow(dict[str, Any]):
    """A record of a table, whose structs have every key of their column: those that a record lacks are null."""


class RowGroups:
    """Cache of the last row groups read from Parquet files. One lock: pyarrow readers are not thread-safe."""

    def __init__(self) -> None:
        self._tables: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: str, group: int, metadata: Any) -> Any:
        with self._lock:
            table = self._tables.pop((file, group), None)
            if table is None:
                with _parquet(file, metadata) as opened:
                    table = opened.read_row_group(group)
            self._tables[file, group] = table
            if len(self._tables) > ROW_GROUPS:
                self._tables.popitem(last=False)
            return table


@contextlib.contextmanager
def _parquet(file: str, metadata: Any = None) -> Iterator[Any]:
    parquet = library("pyarrow.parquet", "reading .parquet files")
    try:
        with parquet.ParquetFile(file, metadata=metadata) as opened:
            yield opened
    except PermissionError as error:
        raise unreadable(file, error) from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise UserError(f"{file}: damaged, truncated or not Parquet ({first_line(error)}); copy it again") from error


class Parquet:
    """The rows of one file; row groups are read on demand."""

    def __init__(self, file: str, row_groups: RowGroups):
        self._file, self._row_groups = file, row_groups
        with _parquet(file) as opened:
            self._metadata = opened.metadata
        sizes = [self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if not len(self):
            raise UserError(f"{file} has no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, i: int) -> str:
        return f"{self._file} row {i + 1}"

    def read(self, i: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        table = self._row_groups.get(self._file, group, self._metadata)
        return TableRow(table.slice(i - self._starts[group], 1).to_pylist()[0])


class ArrayRecord:
    """The records of one file: JSON objects if the first record is one, else texts."""

    def __init__(self, file: str):
        module = library("array_record.python.array_record_module", "reading .array_record files")
        self._file, self._lock = file, threading.Lock()
        with reading(file), open(file, "rb"):  # the library gives no reason if it cannot open a file
            self._reader = module.ArrayRecordReader(file, "readahead_buffer_size:0")
        if not self._reader.ok():
            raise UserError(f"{file}: damaged, truncated or not ArrayRecord; copy it again")
        if not len(self):
            raise UserError(f"{file} has no records")
        first = self._read(0)
        try:
            self._json = isinstance(parse_json(first, file), dict)
        except UserError:
            self._json = False

    def __len__(self) -> int:
        return self._reader.num_records()

    def where(self, i: int) -> str:
        return f"{self._file} record {i + 1}"

    def _read(self, i: int) -> bytes:
        try:
            with self._lock:
                (data,) = self._reader.read([i])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.where(i)}: damaged ({first_line(error)}); copy the file again") from error
        return data

    def read(self, i: int) -> dict[str, Any]:
        data = self._read(i)
        return parse(data, self.where(i)) if self._json else {"text": decode(data, self.where(i))}


class Dataset:
    """A folder written by Hugging Face datasets, memory-mapped by that library."""

    def __init__(self, folder: str):
        datasets = library("datasets", "reading a folder of Hugging Face datasets")
        self._folder = folder
        try:
            self._rows = datasets.load_from_disk(folder).with_format(None)
        except PermissionError as error:
            raise unreadable(folder, error) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: damaged, or not a folder of datasets ({first_line(error)}); copy it again"
            ) from error
        if not len(self):
            raise UserError(f"{folder} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        return f"{self._folder} row {i + 1}"

    def read(self, i: int) -> dict[str, Any]:
        try:
            return TableRow(self._rows[i])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.where(i)}: damaged ({first_line(error)}); copy the folder again") from error
