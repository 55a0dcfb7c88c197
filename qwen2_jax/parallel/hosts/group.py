# SPDX-License-Identifier: Apache-2.0
"""The processes of a job as one of them sees them."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from qwen2_jax.errors import UserError

LOST = 75  # exit code of a process that stops because another one is gone (EX_TEMPFAIL: the same command goes on)


class HostError(UserError):
    """Processes that should work together do not."""


@dataclasses.dataclass
class Group:
    """The processes of a job. process, processes: this one's number and how many there are; hosts: their machines.

    place: what this process is doing, in words, and `moves`, how often it began something: where no process moves for
    a long time, the watcher stops them and tells where each one is. unhurried: the place may take any time.
    """

    process: int = 0
    processes: int = 1
    hosts: tuple[str, ...] = ()
    place: str = "starting"
    moves: int = 0
    unhurried: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that tells and writes what is told and written once."""
        return self.process == 0

    def at(self, place: str, *, unhurried: bool = False) -> None:
        """This process begins something. Costs nothing: it is told to nobody until somebody asks."""
        self.place, self.unhurried = place, unhurried
        self.moves += 1

    def named(self, process: int) -> str:
        """A process in a message."""
        return f"process {process}" + (f" on {self.hosts[process]}" if process < len(self.hosts) else "")


def processes_named(processes: Iterable[int]) -> str:
    """Numbers in a message: "process 3", "processes 0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(processes):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return ("process " if one else "processes ") + ", ".join(shown[:16]) + ", ..." * (len(shown) > 16)


def client_and_place() -> tuple[Any, int, int]:
    """(client of jax's coordination service or None, number of this process, number of processes).

    Touches no device. Where jax.distributed was not started, this process is alone.
    """
    if "jax" not in sys.modules:
        return None, 0, 1
    from jax._src.distributed import global_state  # jax has no public way to the service's keys and barriers

    if global_state.client is None or global_state.num_processes == 1:
        return None, 0, 1
    return global_state.client, global_state.process_id, global_state.num_processes


def leave(code: int) -> NoReturn:
    """Ends the program. One of several that failed ends at once: what else would wait for the others has no end."""
    if client_and_place()[0] is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
