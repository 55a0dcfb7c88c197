# SPDX-License-Identifier: Apache-2.0
"""Finds the coordinator, the process count and this process's number: flags, environment, cluster detection."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping

from qwen2_jax.errors import UserError

FLAGS = """several hosts (automatic on TPU pods, GKE, SLURM and Open MPI; docs/pods.md has a recipe for each):
  --coordinator HOST:PORT   address of process 0, the same on all hosts (or JAX_COORDINATOR_ADDRESS)
  --processes N             number of processes (or JAX_NUM_PROCESSES); 1: run as a single process on any machine
  --process I               number of this process, from 0 (or JAX_PROCESS_ID)
  --host-timeout SECONDS    stop when a process has sent no heartbeat for this long (default 30)"""

HEARTBEAT = 30  # seconds
SHORTEST = 5  # seconds, least --host-timeout; jax sends a heartbeat about every second
HOW_TO_SAY = "give --coordinator HOST:PORT --processes N --process I, or --processes 1 to run as a single process"


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command line; None for those not given."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    host_timeout: int = HEARTBEAT


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of a job of several.

    address: "host:port" of process 0. devices: ids of the local devices that this process uses, None for all.
    how: what these values come from. heartbeat: seconds without a heartbeat after which a process counts as lost.
    """

    address: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    how: str = "flags"
    heartbeat: int = HEARTBEAT

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"the coordinator is HOST:PORT, as in 10.0.0.2:1234, with a port below 65536; given {self.address!r}"
            )
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"process {self.process} of {self.processes}: --process counts from 0 to {self.processes - 1}, one "
                "number for each process"
            )
        if self.heartbeat < SHORTEST:
            raise UserError(f"--host-timeout {self.heartbeat}: give at least {SHORTEST}, or a busy host counts as lost")


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags for several hosts."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 of several hosts")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes (1: a single process)")
    parser.add_argument("--process", type=int, metavar="I", help="number of this process, from 0")
    parser.add_argument(
        "--host-timeout", type=int, metavar="S", default=HEARTBEAT,
        help=f"seconds without a heartbeat until the others stop (default {HEARTBEAT})",
    )  # fmt: skip


def flags_of(found: argparse.Namespace) -> Flags:
    """The flags parsed by a parser with add_flags."""
    return Flags(found.coordinator, found.processes, found.process, found.host_timeout)


def find(flags: Flags, environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch from flags, then JAX_* variables, then cluster detection; each fills what the earlier ones leave open.

    None: a single process. Raises UserError if only some of the values can be found. Imports jax only if the
    environment looks like a cluster.
    """
    address = flags.coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _number(flags.processes, "JAX_NUM_PROCESSES", environ)
    process = _number(flags.process, "JAX_PROCESS_ID", environ)
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: give at least 1")
    if processes == 1:
        return None
    if address is not None and processes is not None and process is not None:
        return Launch(address, processes, process, heartbeat=flags.host_timeout)
    if (found := _cluster(environ)) is not None:
        processes = processes or found.processes
        if processes == 1:
            return None
        process = found.process if process is None else process
        return Launch(address or found.address, processes, process, found.devices, found.how, flags.host_timeout)
    given = {"--coordinator": address, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        raise UserError(
            f"{', '.join(name for name in given if name not in missing)} given, but no {' and no '.join(missing)}, and "
            f"no cluster was detected: {HOW_TO_SAY}"
        )
    return None


def _number(given: int | None, variable: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise UserError(f"{variable}={text!r} is not a number")
    return int(text)


@dataclasses.dataclass(frozen=True)
class _Found:
    address: str
    processes: int
    process: int
    devices: tuple[int, ...] | None
    how: str


def _hinted(environ: Mapping[str, str]) -> bool:
    """Whether this may be a cluster. Cheap; False is always right."""
    return (
        "SLURM_STEP_NODELIST" in environ
        or "OMPI_COMM_WORLD_SIZE" in environ
        # Every pod of Kubernetes has the first one; only those of an indexed job have the second.
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
        or importlib.util.find_spec("libtpu") is not None
    )


def _cluster(environ: Mapping[str, str]) -> _Found | None:
    """The result of jax's own cluster detection, which reads os.environ; `environ` must equal it."""
    if not _hinted(environ):
        return None
    import jax  # noqa: F401 - detects whether this is a TPU VM
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        name = kind.__name__.removesuffix("Cluster")
        if kind.opt_in_only_method or (name == "K8s" and "JOB_COMPLETION_INDEX" not in environ):
            continue
        try:
            if not kind.is_env_present():
                continue
            if (processes := kind.get_process_count()) == 1:
                return _Found("", 1, 0, None, name)
            port = environ.get("JAX_COORDINATOR_PORT")
            address = environ.get("JAX_COORDINATOR_ADDRESS") or kind.get_coordinator_address(
                timeout_secs=300, override_coordinator_port=port
            )
            return _Found(address, processes, kind.get_process_id(), _own_devices(kind, environ), name)
        except (ImportError, OSError) as why:  # no `requests`, or the metadata server is unreachable
            print(f"warning: cluster detection ({name}) failed, running as a single process: {why}", file=sys.stderr)
        except (RuntimeError, ValueError, KeyError) as why:
            raise UserError(f"this looks like {name}, but cluster detection failed ({why}): {HOW_TO_SAY}") from why
    return None


def _own_devices(kind, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """One device for each of several processes on a host; all devices for a process that is alone on its host.

    jax.distributed gives such a process the first device only and leaves the others unused.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if running_in_cloud_tpu_vm or "JAX_LOCAL_DEVICE_IDS" in environ or (local := kind.get_local_process_id()) is None:
        return None
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")  # "8(x2)" or "2,1"
    one_each = {part.split("(")[0] for part in tasks.split(",")} == {"1"}
    return None if one_each or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else (local,)
