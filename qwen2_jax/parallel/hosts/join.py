# SPDX-License-Identifier: Apache-2.0
"""Joining the other processes and leaving them, whichever way the work ends."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from qwen2_jax.errors import UserError
from qwen2_jax.parallel.hosts import rendezvous
from qwen2_jax.parallel.hosts.barriers import barrier
from qwen2_jax.parallel.hosts.group import Group, client_and_place, leave
from qwen2_jax.parallel.hosts.launch import Launch
from qwen2_jax.parallel.hosts.watchdog import Watcher

ARRIVAL = 300.0  # seconds for all processes to come
STALL = 3600.0  # seconds without a step, an evaluation or a save of any process


@contextmanager
def joined(
    launch: Launch | None,
    *,
    goes_on: str = "The same command on all hosts starts again",
    preemption: bool = True,
    arrival: float = ARRIVAL,
    stall: float = STALL,
) -> Iterator[Group]:
    """The processes of the job, as long as the block runs. None, one process: nothing happens.

    goes_on: what to do when another process was lost, a sentence without its full stop. preemption: SIGTERM to one
    process becomes a request to all (qwen2_jax/train/state/preemption.py asks for it). arrival: seconds to wait for the
    others. stall: seconds without any process beginning anything after which the job counts as stuck; 0: never.

    Must be entered before jax is asked for devices. An exception in the block is told to the other processes, which
    stop with it; when one of them is lost or fails, this process ends with a message and exit code: that of the other
    one where it says, else LOST. Raises HostError where the others do not come.
    """
    if launch is None:
        yield Group()
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # warnings of the service's C++, read when jax is imported
    hosts = rendezvous.call(launch, seconds=arrival, bind=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"))
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
        cluster_detection_method="deactivate",  # launch.py has asked
        initialization_timeout=60,  # all are there
        heartbeat_timeout_seconds=launch.heartbeat,
        shutdown_timeout_seconds=60,
    )
    client, *_ = client_and_place()
    group = Group(launch.process, launch.processes, tuple(hosts))
    watcher = Watcher(group, launch, client, goes_on=f"{goes_on}.", stall=stall)
    watcher.start()
    if group.first:
        machines = len(set(hosts))
        print(
            f"{group.processes} processes on {machines} host{'s' * (machines > 1)} have met at {launch.address} "
            f"(known from {launch.how})",
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
    if group.first and hasattr(client, "get_live_nodes"):  # who loses the service before having left it is aborted
        while len(client.get_live_nodes(list(range(launch.processes)))) > 1:
            pass
    del client
    watcher.client = None
    jax.distributed.shutdown()
    watcher.release()


def _failed(watcher: Watcher, error: BaseException) -> None:
    """Tells the others. Returns for errors that the caller puts into words; ends the process after all others."""
    mine = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, RuntimeError) and not mine:
        watcher.wait()  # a collective fails where another process is gone: that is then the reason to give
    said = isinstance(error, (UserError, OSError, KeyboardInterrupt))
    code = 130 if isinstance(error, KeyboardInterrupt) else 2 if said else 1
    reason = str(error) if said and str(error) else f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SystemExit):  # it has said why
        code = error.code if isinstance(error.code, int) else 1
        reason = "its output says why"
    watcher.fail(code, reason)
    if not said:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error, file=sys.stderr)
        leave(code)
