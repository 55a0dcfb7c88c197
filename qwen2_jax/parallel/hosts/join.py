# SPDX-License-Identifier: Apache-2.0
"""Starts the processes of a job together and ends them together, also when one of them fails."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from qwen2_jax.errors import UserError
from qwen2_jax.parallel.hosts import rendezvous
from qwen2_jax.parallel.hosts.barriers import barrier
from qwen2_jax.parallel.hosts.group import Group, client_and_process, leave
from qwen2_jax.parallel.hosts.launch import Launch
from qwen2_jax.parallel.hosts.watchdog import Watcher

ARRIVAL = 300.0  # seconds in which all processes must connect
STALL = 3600.0  # seconds in which some process must begin a step, an evaluation or a save


@contextmanager
def joined(
    launch: Launch | None,
    *,
    goes_on: str = "The same command on all hosts starts again",
    preemption: bool = True,
    arrival: float = ARRIVAL,
    stall: float = STALL,
) -> Iterator[Group]:
    """Connects the processes of the job and yields their Group. launch None: a single process, nothing is done.

    goes_on: what the user can do when another process was lost, a sentence without a full stop. preemption: SIGTERM
    to one process becomes a request to all (qwen2_jax/train/state/preemption.py polls it). arrival: seconds to wait for
    the other processes. stall: seconds after which a job counts as stuck if no process has begun anything; 0: no limit.

    Enter it before jax initializes its devices. An exception in the block stops all processes. When another process
    fails or is lost, this one exits with a message and the other one's exit code, or LOST if that is unknown. Raises
    HostError if not all processes connect.
    """
    if launch is None:
        yield Group()
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides C++ warnings; read when jax is imported
    launch = rendezvous.with_routable_address(launch)
    key = rendezvous.token(launch)
    bind = rendezvous.bind_address(launch, seconds=arrival) if launch.process == 0 else ""
    hosts = rendezvous.call(launch, seconds=arrival, bind=bind, key=key)
    import jax

    if hasattr(jax.config, "jax_enable_recoverability"):  # see watchdog.py
        jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", preemption)
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        launch.address,
        launch.processes,
        launch.process,
        local_device_ids=None if launch.devices is None else list(launch.devices),
        cluster_detection_method="deactivate",  # launch.py has run it
        coordinator_bind_address=bind or None,  # jax's default is all interfaces
        initialization_timeout=60,  # all processes are running
        heartbeat_timeout_seconds=launch.heartbeat,
        shutdown_timeout_seconds=60,
    )
    client, *_ = client_and_process()
    group = Group(launch.process, launch.processes, tuple(hosts))
    watcher = Watcher(group, launch, client, goes_on=f"{goes_on}.", stall=stall)
    watcher.start()
    if group.first:
        machines = len(set(hosts))
        print(
            f"{group.processes} processes on {machines} host{'s' * (machines > 1)} connected at {launch.address} "
            f"(found by: {launch.how})",
            file=sys.stderr,
            flush=True,
        )
    try:
        yield group
    except BaseException as error:
        _failed(watcher, error)
        raise
    group.at("at the end")
    watcher.stop()
    barrier("the end", seconds=stall or STALL)
    if group.first and hasattr(client, "get_live_nodes"):  # jax aborts a process that loses the service before leaving
        while len(client.get_live_nodes(list(range(launch.processes)))) > 1:
            pass
    del client
    watcher.client = None
    jax.distributed.shutdown()
    watcher.release()


def _failed(watcher: Watcher, error: BaseException) -> None:
    """Notifies the other processes. Returns if the caller reports the error; otherwise prints it and exits."""
    mine = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, RuntimeError) and not mine:
        watcher.wait()  # a collective also fails because another process was lost; report that instead
    reported = isinstance(error, (UserError, OSError, KeyboardInterrupt))
    code = 130 if isinstance(error, KeyboardInterrupt) else 2 if reported else 1
    reason = str(error) if reported and str(error) else f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SystemExit):  # its message is printed already
        code = error.code if isinstance(error.code, int) else 1
        reason = "see its output"
    watcher.fail(code, reason)
    if not reported:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error, file=sys.stderr)
        leave(code)
