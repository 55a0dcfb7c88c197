# SPDX-License-Identifier: Apache-2.0
"""The group of processes that work on one job, and helpers for messages about them."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from qwen2_jax.errors import UserError

LOST = 75  # exit code when another process was lost (EX_TEMPFAIL: running the same command again resumes)


class HostError(UserError):
    """The processes of a job cannot connect, do not agree, or were lost."""


@dataclasses.dataclass
class Group:
    """The processes of a job.

    process: this process's number. processes: their count. hosts: host name of each process.
    activity: what this process is doing, for messages. started: how many activities it has begun; if no process begins
    a new one for a long time, the watchdog stops the job and reports what each one was doing. no_time_limit: the
    current activity may take any time.
    """

    process: int = 0
    processes: int = 1
    hosts: tuple[str, ...] = ()
    activity: str = "starting"
    started: int = 0
    no_time_limit: bool = False

    @property
    def first(self) -> bool:
        """Whether this is process 0, which does the logging and the shared writes."""
        return self.process == 0

    def at(self, activity: str, *, no_time_limit: bool = False) -> None:
        """Records that this process begins `activity`; reported only if the job stalls."""
        self.activity, self.no_time_limit = activity, no_time_limit
        self.started += 1

    def named(self, process: int) -> str:
        """A process and its host, for a message."""
        return f"process {process}" + (f" on {self.hosts[process]}" if process < len(self.hosts) else "")


def processes_named(processes: Iterable[int]) -> str:
    """Process numbers for a message: "process 3", "processes 0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(processes):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return ("process " if one else "processes ") + ", ".join(shown[:16]) + ", ..." * (len(shown) > 16)


def client_and_process() -> tuple[Any, int, int]:
    """(client of jax's coordination service or None, number of this process, number of processes).

    Initializes no device. Without jax.distributed there is one process.
    """
    if "jax" not in sys.modules:
        return None, 0, 1
    from jax._src.distributed import global_state  # no public API for the service's keys and barriers

    if global_state.client is None or global_state.num_processes == 1:
        return None, 0, 1
    return global_state.client, global_state.process_id, global_state.num_processes


def leave(code: int) -> NoReturn:
    """Exits; one of several processes without exit handlers, which could wait for the others forever."""
    if client_and_process()[0] is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
