# SPDX-License-Identifier: Apache-2.0
"""A folder of tokens appears complete or not at all; one process builds it while others wait for it.

Unlike atomic_folder.py, which refuses a second writer and a folder that is there: here both are allowed.
"""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen2_jax.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: two builders then both work, and one result is thrown away
    fcntl = None  # type: ignore[assignment]

UNFINISHED, OLD = ".unfinished", ".old"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """One builder on this machine at a time; yields whether the file system's lock excludes the others.

    On a disk that machines share, or without locks, see publish.
    """
    path, held = folder.with_name(folder.name + ".lock"), False
    with contextlib.ExitStack() as stack:
        while not held and fcntl is not None:
            lock = stack.enter_context(open(path, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # The previous holder removed the file: a lock on the removed file excludes nobody.
                held = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            except FileNotFoundError:
                continue
            except OSError:  # a file system without locks
                break
        try:
            yield held
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(folder: Path, alone: bool) -> Iterator[Path]:
    """An empty folder beside the wanted one, removed at the end; also removes what killed processes left.

    alone: no other process of this machine works here now, so leftover folders belong to dead processes, even if their
    PID was reused: in a container that restarts, a process gets the same PID again.
    """
    mine = f"{folder.name}{UNFINISHED}-{socket.gethostname()}-"
    for stale in folder.parent.iterdir():
        number = stale.name.removeprefix(mine).removesuffix(OLD)
        # Not a number: of host "node-1", where this one is "node".
        if stale.name.startswith(mine) and number.isdigit() and (alone or not _alive(int(number))):
            shutil.rmtree(stale, ignore_errors=True)
    work = folder.with_name(f"{mine}{os.getpid()}")
    work.mkdir()
    try:
        yield work
    except OSError as why:
        if why.errno == errno.ENOSPC:
            text = f"the disk became full while tokenising; nothing was left behind. Free some space: {folder.parent}"
            raise OSError(errno.ENOSPC, text) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this PID."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def publish(work: Path, folder: Path, is_wanted: Callable[[], bool]) -> None:
    """Gives the finished folder its name, replacing an outdated one. is_wanted: whether that one is current."""
    for _ in range(10):
        try:
            os.replace(work, folder)  # fails where a folder with something in it is in the way
            return
        except OSError as why:
            if why.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
                raise
        if is_wanted():  # another machine was faster; its tokens are the same
            return
        old = work.with_name(work.name + OLD)
        with contextlib.suppress(FileNotFoundError):  # another machine moved it first
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    raise UserError(f"{folder} keeps changing; stop the other processes that write it")
