# SPDX-License-Identifier: Apache-2.0
"""Several processes that do one job together: starting, agreeing, and ending together.

    launch = hosts.find(flags)              # a TPU pod, GKE, SLURM, Open MPI, flags, or None: this process is alone
    with hosts.joined(launch) as group:     # before anything asks jax for devices
        hosts.check(group, settings)        # the same code, packages and settings everywhere, or an error that names it
        ...

None of this imports jax, opens a socket or reads a file where one process works alone. docs/pods.md says how to launch.

What the hosts tell each other here goes through jax's coordination service, a server in process 0, and not through the
devices' collectives: it works before there are any, has time limits, and can say who is missing.
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
    "FLAGS",
    "LOST",
    "Difference",
    "Flags",
    "Group",
    "HostError",
    "Launch",
    "add_flags",
    "barrier",
    "check",
    "check_devices",
    "differences",
    "find",
    "flags_of",
    "joined",
    "leave",
]

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
