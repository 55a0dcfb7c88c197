# SPDX-License-Identifier: Apache-2.0
"""Waits until every process is there, and says who is not.

jax's coordination service waits too, but it aborts the processes that did come and does not say which did not. So
process 0 first listens itself on the service's port: the others say who they are, and are told to go on, or why not.
"""

import contextlib
import json
import socket
import time

from qwen2_jax.parallel.hosts.group import HostError, processes_named
from qwen2_jax.parallel.hosts.launch import Launch

MOST = 4096  # bytes of what somebody who connects may say
PATIENCE = 5.0  # seconds for somebody who has connected to say it


def call(launch: Launch, *, seconds: float, bind: str | None = None) -> list[str]:
    """Returns the names of the machines, by process, when all processes are there; raises HostError on all of them.

    bind: "host:port" for process 0 to listen on, default every address of the machine.
    """
    return _collect(launch, seconds, bind) if launch.process == 0 else _report(launch, seconds)


def _collect(launch: Launch, seconds: float, bind: str | None) -> list[str]:
    address, end = bind or f"[::]:{launch.address.rpartition(':')[2]}", time.monotonic() + seconds
    here: dict[int, tuple[socket.socket, str]] = {}
    problem = ""
    try:
        with _listen(address) as server:
            try:
                while len(here) < launch.processes - 1 and not problem and (left := end - time.monotonic()) > 0:
                    server.settimeout(left)
                    try:
                        talk, _ = server.accept()
                    except TimeoutError:
                        break
                    said = _hear(talk)
                    if said is None:  # a port scanner, a health check
                        talk.close()
                        continue
                    process, processes, name = said
                    if processes != launch.processes:
                        problem = (
                            f"process {process} on {name} was told of {processes} processes, and process 0 of "
                            f"{launch.processes}: give all hosts the same --processes"
                        )
                    elif not 0 < process < launch.processes or process in here:
                        problem = (
                            f"two processes say that they are process {process}, on {name} and on "
                            f"{here[process][1] if process in here else socket.gethostname()}: give each its own "
                            "--process"
                        )
                    if problem:
                        _answer(talk, {"error": problem})
                        talk.close()
                        break
                    here[process] = (talk, name)
                absent = [i for i in range(1, launch.processes) if i not in here]
                if absent and not problem:
                    problem = (
                        f"{processes_named(absent)} of {launch.processes} did not come to {launch.address} within "
                        f"{seconds:.0f} s: look at their output; are they started, with the same --coordinator, and "
                        "may their hosts connect to that port?"
                    )
                names = [socket.gethostname(), *(here[i][1] for i in sorted(here))]
                for talk, _ in here.values():
                    _answer(talk, {"error": problem} if problem else {"hosts": names})
                for talk, _ in here.values():
                    _until_closed(talk)  # who closes first keeps the port busy for a minute; it must not be this one
            finally:
                for talk, _ in here.values():
                    talk.close()
    except OSError as why:
        raise HostError(
            f"process 0 cannot listen on {address}: {why.strerror or why}. Is another run using the port? Choose "
            "another one with --coordinator on all hosts"
        ) from why
    if problem:
        raise HostError(problem)
    return names


def _report(launch: Launch, seconds: float) -> list[str]:
    host, _, port = launch.address.rpartition(":")
    end, why = time.monotonic() + seconds, "no answer"
    hello = {"process": launch.process, "processes": launch.processes, "host": socket.gethostname()}
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10.0)) as talk:
                talk.sendall(json.dumps(hello).encode() + b"\n")
                talk.settimeout(max(left, 1.0) + PATIENCE)
                answer = json.loads(_line(talk))
                if "error" in answer:
                    raise HostError(answer["error"])
                return answer["hosts"]
        except HostError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:  # not there yet, or something else listens there
            why = str(getattr(error, "strerror", None) or error)
            time.sleep(min(0.5, max(0.0, end - time.monotonic())))
    raise HostError(
        f"process {launch.process} of {launch.processes} did not reach process 0 at {launch.address} within "
        f"{seconds:.0f} s ({why}): is process 0 running, is that its address as seen from this host, and does a "
        "firewall let the port through?"
    )


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if host in ("", "::") and socket.has_dualstack_ipv6():
        return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    family = socket.AF_INET6 if ":" in host and host != "::" else socket.AF_INET
    return socket.create_server(("" if host == "::" else host, int(port)), family=family, backlog=1024)


def _hear(talk: socket.socket) -> tuple[int, int, str] | None:
    talk.settimeout(PATIENCE)
    try:
        said = json.loads(_line(talk))
        return int(said["process"]), int(said["processes"]), str(said["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answer(talk: socket.socket, answer: dict) -> None:
    with contextlib.suppress(OSError):  # it has left; that comes out later
        talk.sendall(json.dumps(answer).encode() + b"\n")


def _until_closed(talk: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while talk.recv(MOST):
            pass


def _line(talk: socket.socket) -> bytes:
    """What is said until the end of a line. Raises ValueError where that does not come."""
    with talk.makefile("rb") as file:
        line = file.readline(MOST * 256)
    if not line.endswith(b"\n"):
        raise ValueError("it hung up")
    return line
