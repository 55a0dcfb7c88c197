# SPDX-License-Identifier: Apache-2.0
"""Writes a folder or a file atomically: it has a temporary name until all of it is on the disk."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: two writers of one folder then go unnoticed
    fcntl = None  # type: ignore[assignment]

from qwen2_jax.errors import CheckpointError

UNFINISHED = ".unfinished"  # suffix of the folder that is written until it gets its name
MARKER = "UNFINISHED"  # file in that folder
REPLACED = "replaced"  # in that folder: the old target, between the two renames


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, nbytes: int, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` when the block ends, and is removed when it fails.

    nbytes: size of the result, checked against the free space first. Leftovers of a killed run are removed. replace: an
    existing folder at `path` stays until the new one is complete, and is then replaced by two renames and removed; a
    kill between the renames is repaired by the next call. Raises CheckpointError if
    `path` holds something that may not be replaced, OSError if the disk is too small.
    """
    target = _local(path)
    if target.exists() and (not target.is_dir() or (not replace and any(target.iterdir()))):
        raise CheckpointError(f"{path} exists already; choose a new folder or remove that one first")
    if target.is_symlink() and not target.exists():
        raise CheckpointError(f"{path} is a link to {os.readlink(target)}, which is not there; remove it first")
    folder = unfinished(path)
    work = folder.parent
    if work.exists() and not (work / MARKER).exists() and (not work.is_dir() or any(work.iterdir())):
        raise CheckpointError(f"{work} is in the way, and was not left by a stopped run; move it elsewhere")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / MARKER, "w") as marker:
        _lock(marker, path)
        try:
            _put_back(work, target)
            for left in work.iterdir():  # of a run that was killed
                if left.name != MARKER:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            _need_space(target.parent, nbytes)
            folder.mkdir()
            yield folder
            for inside, _, _ in os.walk(folder):  # entries of the folders; write_file has synced the contents
                _sync(Path(inside))
            if target.exists() and any(target.iterdir()):
                os.replace(target, work / REPLACED)
            os.replace(folder, target)
            _sync(target.parent)
        except OSError as why:
            raise _explained(why, path) from None
        finally:
            _put_back(work, target)
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike, nbytes: int) -> Iterator[BinaryIO]:
    """Yields an empty file of `nbytes` bytes that becomes `path` when the block ends, and is removed when it fails.

    Leftovers of a killed run are overwritten. Raises CheckpointError if `path` exists or another
    process writes it, OSError if the disk is too small.
    """
    target = _local(path)
    if target.exists():
        raise CheckpointError(f"{path} exists already; choose another name or remove it first")
    part = target.with_name(target.name + UNFINISHED)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:  # not truncated before it is locked
        _lock(file, path)
        try:
            _need_space(target.parent, nbytes)
            with open(part, "r+b") as content:
                content.truncate(0)
                content.truncate(nbytes)
                yield content
                content.flush()
                os.fsync(content.fileno())
            os.replace(part, target)
            _sync(target.parent)
        except OSError as why:
            raise _explained(why, path) from None
        finally:
            part.unlink(missing_ok=True)


def _local(path: str | os.PathLike) -> Path:
    if str(path).startswith("gs://"):
        raise CheckpointError(f"{path}: write to a local folder first, then copy it whole with `gcloud storage cp -r`")
    target = Path(path).expanduser().absolute()
    check_folder(target.parent)
    return target


def check_folder(path: Path) -> None:
    """Raises CheckpointError where `path` cannot be a folder because it, or what it would lie in, is a file."""
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if there.exists() and not there.is_dir():
        raise CheckpointError(f"{there} is a file and not a folder; give the path of a folder, or of a new one")


def _lock(file: IO[Any], path: str | os.PathLike) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{path} is being written by another process") from None


def _explained(why: OSError, path: str | os.PathLike) -> OSError:
    if why.errno != errno.ENOSPC:
        return why
    text = f"the disk became full; nothing was left behind. Free some space and run again: {path}"
    return OSError(errno.ENOSPC, text)


def unfinished(path: str | os.PathLike) -> Path:
    """The folder in which `new_folder` works until it is renamed."""
    target = Path(path).expanduser().absolute()
    return target.with_name(target.name + UNFINISHED) / "checkpoint"


def _put_back(work: Path, target: Path) -> None:
    """Undoes a replacement that was stopped between its two renames."""
    if (work / REPLACED).exists() and not target.exists():
        os.replace(work / REPLACED, target)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small new file and syncs it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _need_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        need, have = f"{nbytes / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise OSError(f"{folder} needs {need} of disk and has {have} free; free some or choose another disk")


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
