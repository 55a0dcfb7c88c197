# SPDX-License-Identifier: Apache-2.0
"""Which process of how many this is, and where the first one is: from flags, the environment, or the cluster."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping

from qwen2_jax.errors import UserError

FLAGS = """several hosts (found by itself on TPU pods, GKE, SLURM and Open MPI; docs/pods.md has a recipe for each):
  --coordinator HOST:PORT   where process 0 can be reached, the same on all hosts (or JAX_COORDINATOR_ADDRESS)
  --processes N             how many processes there are (or JAX_NUM_PROCESSES); 1: this one is alone, wherever it runs
  --process I               which one this is, from 0 (or JAX_PROCESS_ID)
  --host-timeout SECONDS    how long a process may show no sign of life before the others stop (default 30)"""

HEARTBEAT = 30  # seconds
SHORTEST = 5  # of --host-timeout: jax sends a sign of life every second or so
HOW_TO_SAY = "give --coordinator HOST:PORT --processes N --process I, or --processes 1 if this process is to work alone"


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the command line says; None where it says nothing."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    host_timeout: int = HEARTBEAT


@dataclasses.dataclass(frozen=True)
class Launch:
    """A process of a job of several.

    address: "host:port" of process 0. devices: ids of the local devices that are this process's, None for all.
    how: what told so. heartbeat: seconds without a sign of life after which a process counts as gone.
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
            raise UserError(f"--host-timeout {self.heartbeat}: at least {SHORTEST}, or a busy host counts as gone")


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of several hosts."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several hosts can be reached")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are (1: this one, wherever it runs)")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument(
        "--host-timeout", type=int, metavar="S", default=HEARTBEAT,
        help=f"seconds without a sign of life until the others stop (default {HEARTBEAT})",
    )  # fmt: skip


def flags_of(found: argparse.Namespace) -> Flags:
    """The flags that a parser with add_flags has found."""
    return Flags(found.coordinator, found.processes, found.process, found.host_timeout)


def find(flags: Flags, environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Flags, then JAX_* variables, then what the cluster says, each for what the ones before leave open.

    None: this process is alone. Raises UserError where something is said but not all of it can be known. Imports jax
    only where something hints at a cluster.
    """
    address = flags.coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _number(flags.processes, "JAX_NUM_PROCESSES", environ)
    process = _number(flags.process, "JAX_PROCESS_ID", environ)
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: there is at least 1")
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
            f"no cluster was found that would tell: {HOW_TO_SAY}"
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
    """Whether anything here may be a cluster. Cheap, and never wrong where it says no."""
    return (
        "SLURM_STEP_NODELIST" in environ
        or "OMPI_COMM_WORLD_SIZE" in environ
        # Every pod of Kubernetes has the first one; only those of an indexed job have the second.
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
        or importlib.util.find_spec("libtpu") is not None
    )


def _cluster(environ: Mapping[str, str]) -> _Found | None:
    """What jax's own detection of clusters finds. It reads os.environ, of which `environ` is to be a copy."""
    if not _hinted(environ):
        return None
    import jax  # noqa: F401 - finds out whether this is a TPU VM
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
        except (ImportError, OSError) as why:  # no `requests`, or a metadata server that is not to be reached
            print(f"warning: not asked whether this is one of several hosts ({name}): {why}", file=sys.stderr)
        except (RuntimeError, ValueError, KeyError) as why:
            raise UserError(f"this looks like {name}, but it does not say enough ({why}): {HOW_TO_SAY}") from why
    return None


def _own_devices(kind, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """One device for each of several processes on a host; a process that is alone on its host has all of them.

    jax gives the first one to a process alone, and the others to nobody.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if running_in_cloud_tpu_vm or "JAX_LOCAL_DEVICE_IDS" in environ or (place := kind.get_local_process_id()) is None:
        return None
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")  # "8(x2)" or "2,1"
    one_each = {part.split("(")[0] for part in tasks.split(",")} == {"1"}
    return None if one_each or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else (place,)
