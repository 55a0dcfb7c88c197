# SPDX-License-Identifier: Apache-2.0
"""A lock on a run folder: a second run would overwrite the first one's metrics and checkpoints."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: two runs in one folder then go unnoticed
    fcntl = None  # type: ignore[assignment]

import jax

from qwen2_jax.errors import UserError

NAME = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder until the block ends, or the process does, however it ends: the system lets go of the lock.

    Of several hosts' processes the first one holds it. Raises UserError when another run has it.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another run, {file.read().strip() or 'of an unknown process'}; wait for it, "
                "stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
