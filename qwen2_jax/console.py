# SPDX-License-Identifier: Apache-2.0
"""Progress bars, and sizes in bytes that people can read."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)  # fmt: skip


@contextlib.contextmanager
def progress_bar(
    description: str, console: Console | None = None, *, in_bytes: bool = True, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that shows a bar if the console is a terminal.

    console: default stderr. in_bytes: whether bytes are counted, else items.
    """
    console = console or Console(stderr=True)
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def readable_bytes(n: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"
