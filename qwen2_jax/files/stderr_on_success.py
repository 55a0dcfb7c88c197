# SPDX-License-Identifier: Apache-2.0
"""Keeps native code from printing its stack where the caller turns its failure into one line."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def stderr_on_success() -> Iterator[None]:
    """What the process writes to standard error inside appears at the end, and not at all if an exception is raised.

    Rust prints a panic and its stack before Python sees an exception, so this redirects the file descriptor, for all
    threads: keep what is inside short.
    """
    with contextlib.ExitStack() as stack:
        try:
            real = os.dup(2)
            stack.callback(os.close, real)
            held = stack.enter_context(tempfile.TemporaryFile())
            sys.stderr.flush()
        except (OSError, AttributeError, ValueError):  # no standard error, or no room for a file
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
        held.seek(0)
        with os.fdopen(os.dup(real), "wb") as out:
            shutil.copyfileobj(held, out)
