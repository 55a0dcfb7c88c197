# SPDX-License-Identifier: Apache-2.0
"""Reads files: decompression, UTF-8 and JSON, with errors that name file and line."""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json

MARK = b"\xef\xbb\xbf"  # byte order mark at the start of a UTF-8 file
STEP = 1 << 20  # bytes decompressed at a time


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Converts OSError to a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: OSError) -> UserError:
    return UserError(f"{where}: cannot be read ({error.strerror or error})")


def library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.split(".")[0]
        raise UserError(f'{purpose} needs {missing}: pip install "qwen2-jax[data]"') from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def parse(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `line`; raises UserError, which begins with `where`, if it is not one."""
    return json_object(parse_text(decode(line.rstrip(b"\r\n"), where, numbered=True), where, numbered=True), where)


def parse_text(text: str, where: str, numbered: bool = False) -> Any:
    """The value of a JSON text (json_text.py). numbered: `where` already names the line."""
    try:
        return parse_json(text, where)
    except UserError as error:
        try:
            json.loads(text)
        except json.JSONDecodeError as fault:
            line = "" if numbered else f" line {fault.lineno}"
            given = validate.short(text.split("\n")[fault.lineno - 1].strip())  # JSON does not count U+2028 as a line
            raise UserError(f"{where}{line}: not valid JSON ({fault.msg}, column {fault.colno}): {given}") from None
        except (ValueError, RecursionError):  # parse_json's reason is the plainer one
            pass
        reason = str(error).partition(" is not JSON that can be read: ")[2]
        raise UserError(f"{where}: not valid JSON ({reason})") from None


def json_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(
            f'{where}: {validate.short(record)} is not a JSON object; each record must be one: {{"text": ...}}'
        )
    return record


def decode(data: bytes, where: str, numbered: bool = False) -> str:
    """Decodes UTF-8. numbered: `where` already names the line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = "" if numbered else f" line {before.count(b'\n') + 1}"
        column = error.start - before.rfind(b"\n")
        raise UserError(
            f"{where}{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}, column {column}); save the file as UTF-8"
        ) from error


def pieces(file: str) -> Iterator[bytes]:
    """The file's bytes, decompressed. UserError if it ends too early or its checksums are wrong."""
    line = 1
    try:
        with open(file, "rb") as opened:
            if file.lower().endswith(".gz"):
                with gzip.open(opened) as unpacked:
                    while piece := unpacked.read1(STEP):
                        line += piece.count(b"\n")
                        yield piece
            elif file.lower().endswith(".zst"):
                for piece in _zstandard(opened):
                    line += piece.count(b"\n")
                    yield piece
            else:
                yield opened.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}: damaged or truncated near line {line} ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error


def _zstandard(opened: BinaryIO) -> Iterator[bytes]:
    zstandard = library("zstandard", "reading .zst files")
    frame = None
    while piece := opened.read(1 << 17):
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame is not complete")


def decompressed(file: str, cache: Path) -> Path:
    """The decompressed copy in `cache`, created if missing. Its name is derived from path, size and mtime."""
    with reading(file):
        status = os.stat(file)
    key = hashlib.sha256(f"{os.path.abspath(file)}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache / f"{Path(file).name.split('.')[0]}-{key}.jsonl"
    if target.exists():
        return target
    temporary = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("*.unfinished"):  # of a killed run; a running one keeps writing
            with contextlib.suppress(FileNotFoundError):  # another host has just removed it
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        # Not mkstemp, whose files only the owner can read: users of a machine may share the cache.
        temporary = cache / f"{target.stem}-{socket.gethostname()}-{os.getpid()}.unfinished"
        with open(temporary, "wb") as out:
            for piece in pieces(file):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"{cache}: cannot decompress {file} to there ({error.strerror}); choose another cache"
        ) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
    return target
