# SPDX-License-Identifier: Apache-2.0
"""Waits until every process has connected to process 0, and names the processes that have not.

jax's coordination service also waits, but when a process is missing it aborts the others without naming it, and it does
not detect unequal --processes. So process 0 first listens on the service's port itself: each process sends its number,
and process 0 replies with all host names or with an error.

Process 0 listens on the coordinator's address only. Both sides prove with an HMAC over the other side's nonce that they
know the same token; a connection that cannot is refused. The token never crosses the network.
"""

import contextlib
import dataclasses
import hmac
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping

from qwen2_jax.parallel.hosts.group import HostError, processes_named
from qwen2_jax.parallel.hosts.launch import Launch

TOKEN = "QWEN2_JAX_HOSTS_TOKEN"  # environment variable: the same random text on all hosts
JOB_IDS = {"Slurm": "SLURM_JOB_ID", "Ompi": "OMPI_MCA_orte_hnp_uri"}  # the same in all processes of a job
MAX_LINE = 1 << 20  # bytes of a message
PATIENCE = 5.0  # seconds in which a new connection must send its message


def with_routable_address(launch: Launch) -> Launch:
    """The launch, with an address that other hosts reach.

    Some systems resolve a host's own name to loopback (Debian: 127.0.1.1). There, the processes on the coordinator's
    host use its address on the default route; the others resolve the name through DNS and need no change.
    """
    host, port = _split(launch.address)
    if _is_ip(host) or host == "localhost" or not _is_loopback(_resolve(launch.address)):
        return launch
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # selects a route; a UDP connect sends nothing
            return dataclasses.replace(launch, address=f"{probe.getsockname()[0]}:{port}")
    except OSError:  # no network besides loopback
        return launch


def bind_address(launch: Launch, *, seconds: float, environ: Mapping[str, str] = os.environ) -> str:
    """The "ip:port" that process 0 listens on: JAX_COORDINATOR_BIND_ADDRESS, else the coordinator's own address.

    seconds: to wait for the name to become known; the DNS entry of a pod may be younger than its container.
    """
    if given := environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return given
    end = time.monotonic() + seconds
    while (ip := _resolve(launch.address)) is None:
        if time.monotonic() > end:
            raise HostError(
                f"process 0 cannot resolve the coordinator's host {_split(launch.address)[0]!r}: give --coordinator a "
                "name or an IP address that every host resolves"
            )
        time.sleep(0.5)
    return f"{f'[{ip}]' if ':' in ip else ip}:{_split(launch.address)[1]}"


def token(launch: Launch, environ: Mapping[str, str] = os.environ) -> bytes:
    """The key of the HMAC: QWEN2_JAX_HOSTS_TOKEN, else the launcher's job id, which other users may be able to read.

    Raises HostError if processes started by flags on several hosts have no token.
    """
    if given := environ.get(TOKEN) or environ.get(JOB_IDS.get(launch.how, ""), ""):
        return given.encode()
    if launch.how == "flags" and not _is_loopback(_resolve(launch.address)):
        raise HostError(
            f"processes on several hosts need a shared token: set {TOKEN} to the same random text on all of them (such "
            "as the output of `openssl rand -hex 16`)"
        )
    return b"local"


def call(launch: Launch, *, seconds: float, bind: str, key: bytes) -> list[str]:
    """Waits for all processes and returns their host names, by process; raises HostError on all of them.

    bind: "ip:port" that process 0 listens on. key: of the HMAC, equal in all processes.
    """
    return _collect(launch, seconds, bind, key) if launch.process == 0 else _report(launch, seconds, key)


def _collect(launch: Launch, seconds: float, bind: str, key: bytes) -> list[str]:
    end = time.monotonic() + seconds
    connected: dict[int, tuple[_Connection, str]] = {}
    refused, problem = 0, ""
    try:
        server = _listen(bind)
    except OSError as error:
        raise HostError(
            f"process 0 cannot listen on {bind}: {error.strerror or error}. If another run is using the port, choose "
            "another one with --coordinator on all hosts; if this is not an address of this host, set "
            "JAX_COORDINATOR_BIND_ADDRESS to one"
        ) from error
    with server, contextlib.ExitStack() as connections:
        while len(connected) < launch.processes - 1 and not problem and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                raw, _ = server.accept()
            except TimeoutError:
                break
            connection = connections.enter_context(contextlib.closing(_Connection(raw, key)))
            hello = connection.receive_hello()
            if hello is None:  # not one of ours, such as a port scanner, or a process with another token
                refused += connection.refused
                connection.close()
                continue
            process, processes, name = hello
            if processes != launch.processes:
                problem = (
                    f"process {process} on {name} was started with {processes} processes, and process 0 with "
                    f"{launch.processes}: give all hosts the same --processes"
                )
            elif not 0 < process < launch.processes or process in connected:
                other = connected[process][1] if process in connected else socket.gethostname()
                problem = (
                    f"two processes have the number {process}, on {name} and on {other}: give each its own --process"
                )
            if problem:
                connection.reply({"error": problem})
                connection.close()
            else:
                connected[process] = connection, name
        absent = [i for i in range(1, launch.processes) if i not in connected]
        if absent and not problem:
            problem = (
                f"{processes_named(absent)} of {launch.processes} did not connect to {launch.address} within "
                f"{seconds:.0f} s: look at their output; check that they were started with the same --coordinator and "
                "that a firewall lets the port through"
            )
            if refused:
                problem += f" ({refused} connections were refused because their {TOKEN} differs)"
        names = [socket.gethostname(), *(connected[i][1] for i in sorted(connected))]
        for connection, _ in connected.values():
            connection.reply({"error": problem} if problem else {"hosts": names})
        for connection, _ in connected.values():
            connection.wait_until_closed()  # the side that closes first blocks the port for a minute: not this one
    if problem:
        raise HostError(problem)
    return names


def _report(launch: Launch, seconds: float, key: bytes) -> list[str]:
    host, port = _split(launch.address)
    end, reason = time.monotonic() + seconds, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=min(left, 10.0)) as raw:
                raw.settimeout(max(left, 1.0) + PATIENCE)
                with contextlib.closing(_Connection(raw, key)) as connection:
                    answer = connection.send_hello(launch.process, launch.processes)
        except HostError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:  # not there yet, or another program listens there
            reason = str(getattr(error, "strerror", None) or error)
            time.sleep(min(0.5, max(0.0, end - time.monotonic())))
            continue
        if "error" in answer:
            raise HostError(answer["error"])
        return answer["hosts"]
    raise HostError(
        f"process {launch.process} of {launch.processes} did not reach process 0 at {launch.address} within "
        f"{seconds:.0f} s ({reason}): check that process 0 is running, that this is its address as seen from this "
        "host, and that a firewall lets the port through"
    )


class _Connection:
    """One line of JSON each way after a nonce; both are signed.

    server: {"nonce"}   client: {"process", "processes", "host", "nonce", "mac"}   server: {"answer", "mac"}
    """

    def __init__(self, raw: socket.socket, key: bytes):
        self._raw, self._file, self._key = raw, raw.makefile("rb"), key
        self._peer_nonce = ""
        self.refused = False

    def receive_hello(self) -> tuple[int, int, str] | None:
        """(process, processes, host) of a client that knows the token; None for any other."""
        nonce = secrets.token_hex(16)
        self._raw.settimeout(PATIENCE)
        try:
            self._send({"nonce": nonce})
            hello = self._receive()
            fields = int(hello["process"]), int(hello["processes"]), str(hello["host"])
            self._peer_nonce = str(hello["nonce"])
            if not hmac.compare_digest(
                str(hello["mac"]).encode(), self._mac(nonce, self._peer_nonce, *fields).encode()
            ):
                self.refused = True
                self._send({"refused": True})
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return fields

    def reply(self, answer: dict) -> None:
        text = json.dumps(answer)
        with contextlib.suppress(OSError):  # the process has ended; the next barrier reports that
            self._send({"answer": text, "mac": self._mac(self._peer_nonce, text)})

    def send_hello(self, process: int, processes: int) -> dict:
        """The verified answer of process 0."""
        nonce, host = secrets.token_hex(16), socket.gethostname()
        server_nonce = str(self._receive()["nonce"])
        mac = self._mac(server_nonce, nonce, process, processes, host)
        self._send({"process": process, "processes": processes, "host": host, "nonce": nonce, "mac": mac})
        answer = self._receive()
        same = "answer" in answer and hmac.compare_digest(
            str(answer["mac"]).encode(), self._mac(nonce, str(answer["answer"])).encode()
        )
        if not same:
            raise HostError(f"process 0 has another token than this process: set the same {TOKEN} on all hosts")
        return json.loads(answer["answer"])

    def close(self) -> None:
        self._file.close()  # the socket stays open as long as its file
        self._raw.close()

    def wait_until_closed(self) -> None:
        with contextlib.suppress(OSError):
            while self._file.read(4096):
                pass

    def _mac(self, *parts: str | int) -> str:
        return hmac.digest(self._key, json.dumps(parts).encode(), "sha256").hex()

    def _send(self, message: dict) -> None:
        self._raw.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> dict:
        """The next message. Raises ValueError if the connection ends before it is complete."""
        line = self._file.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise ValueError("the connection was closed")
        return json.loads(line)


def _listen(address: str) -> socket.socket:
    host, port = _split(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    every = host == "::" and socket.has_dualstack_ipv6()  # only if JAX_COORDINATOR_BIND_ADDRESS asks for it
    return socket.create_server((host, int(port)), family=family, dualstack_ipv6=every, backlog=1024)


def _split(address: str) -> tuple[str, str]:
    """Host, without the brackets of IPv6, and port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def _resolve(address: str) -> str | None:
    """The IP address of a "host:port"; None if the name is unknown, perhaps only now."""
    host, port = _split(address)
    try:
        return str(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(ip: str | None) -> bool:
    return ip is not None and ipaddress.ip_address(ip.partition("%")[0]).is_loopback
