# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes: starting them, comparing their settings, and stopping them together.

    launch = hosts.find(flags)              # flags, TPU pod, GKE, SLURM or Open MPI; None: a single process
    with hosts.joined(launch) as group:     # before jax initializes its devices
        hosts.check(group, settings)        # raises an error that names what differs between hosts
        ...

For a single process nothing here imports jax, opens a socket or reads a file. docs/pods.md has launch recipes.

Messages between hosts go through jax's coordination service, a server in process 0, not through collectives on devices:
it works before devices are initialized, has time limits, and can name missing processes.
"""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.parallel.hosts.barriers import Difference, barrier, differences
    from qwen2_jax.parallel.hosts.group import LOST, Group, HostError, leave
    from qwen2_jax.parallel.hosts.join import joined
    from qwen2_jax.parallel.hosts.launch import FLAGS, Flags, Launch, add_flags, find, flags_of
    from qwen2_jax.parallel.hosts.preflight import check, check_devices

__all__ = [
    "FLAGS", "LOST", "Difference", "Flags", "Group", "HostError", "Launch", "add_flags", "barrier", "check",
    "check_devices", "differences", "find", "flags_of", "joined", "leave",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.parallel.hosts.group": ["Group", "HostError", "LOST", "leave"],
        "qwen2_jax.parallel.hosts.join": ["joined"],
        "qwen2_jax.parallel.hosts.launch": ["FLAGS", "Flags", "Launch", "add_flags", "find", "flags_of"],
        "qwen2_jax.parallel.hosts.preflight": ["check", "check_devices"],
        "qwen2_jax.parallel.hosts.barriers": ["Difference", "barrier", "differences"],
    },
)
