# SPDX-License-Identifier: Apache-2.0
"""All processes connect, or all that did get the same error. Connections without the token are refused."""

import concurrent.futures
import json
import socket
import time

import pytest

from qwen2_jax.parallel.hosts import HostError, Launch, rendezvous

KEY = b"secret"


def call(launch, *, seconds, key=KEY):
    return rendezvous.call(launch, seconds=seconds, bind=launch.address, key=key)


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def called(launches, seconds):
    """The result of each process, host names or an error. The last process starts first."""
    with concurrent.futures.ThreadPoolExecutor(len(launches)) as pool:
        futures = []
        for launch in reversed(launches):
            futures.append(pool.submit(call, launch, seconds=seconds))
            time.sleep(0.2)
        return [str(future.exception() or future.result()) for future in reversed(futures)]


def test_all_come(address):
    names = [socket.gethostname()] * 3
    assert called([Launch(address, 3, i) for i in range(3)], 20) == [str(names)] * 3


def test_one_does_not_come(address):
    said = called([Launch(address, 4, i) for i in (0, 2)], 1.5)
    assert said[0] == said[1]
    assert said[0].startswith(f"processes 1, 3 of 4 did not connect to {address} within 2 s")


def test_another_number_of_processes(address):
    said = called([Launch(address, 2, 0), Launch(address, 3, 1)], 20)
    assert said[0] == said[1]
    assert "was started with 3 processes, and process 0 with 2: give all hosts the same --processes" in said[0]


def test_two_of_the_same_number(address):
    said = called([Launch(address, 3, i) for i in (0, 1, 1)], 20)
    assert len(set(said)) == 1
    assert "two processes have the number 1, on " in said[0]


def test_nobody_at_the_address(address):
    begin = time.monotonic()
    with pytest.raises(
        HostError, match=r"process 1 of 2 did not reach process 0 at 127.0.0.1:\d+ within 1 s .*refused"
    ):
        call(Launch(address, 2, 1), seconds=1)
    assert time.monotonic() - begin < 5


def test_the_port_is_taken(address):
    there = socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))
    with there, pytest.raises(HostError, match="process 0 cannot listen on .*use.*choose another one"):
        call(Launch(address, 2, 0), seconds=5)


def test_strangers_are_passed_over(address):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, Launch(address, 2, 0), seconds=20)
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[]\n"):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as talk:
                        talk.sendall(word)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
        assert call(Launch(address, 2, 1), seconds=20) == first.result()


def test_a_process_with_another_token_is_refused(address):
    """It gets an error at once, and the others wait for the right one."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, Launch(address, 2, 0), seconds=20)
        with pytest.raises(HostError, match="process 0 has another token .*QWEN2_JAX_HOSTS_TOKEN on all hosts"):
            call(Launch(address, 2, 1), seconds=20, key=b"guess")
        assert call(Launch(address, 2, 1), seconds=20) == first.result()


def test_a_stranger_without_the_token_is_refused(address):
    """A well-formed message without a valid signature; a recorded one does not help, since the nonce is new."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(call, Launch(address, 2, 0), seconds=2)
        hello = {"process": 1, "processes": 2, "host": "x", "nonce": "0", "mac": "0" * 64}
        host, _, port = address.rpartition(":")
        time.sleep(0.3)
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(json.dumps(hello).encode() + b"\n")
            with stranger.makefile() as answers:
                nonce, answer = json.loads(answers.readline())["nonce"], json.loads(answers.readline())
        assert len(nonce) == 32 and answer == {"refused": True}
        with pytest.raises(HostError, match=r"process 1 of 2 did not connect .*\(1 connections were refused"):
            first.result()


def test_a_false_process_0_is_refused(address):
    """A server that does not know the token cannot make a process go on."""
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        process = pool.submit(call, Launch(address, 2, 1), seconds=20)
        with server.accept()[0] as connection:
            connection.sendall(b'{"nonce": "1"}\n')
            connection.recv(1000)
            connection.sendall(json.dumps({"answer": '{"hosts": ["x", "y"]}', "mac": "0" * 64}).encode() + b"\n")
            with pytest.raises(HostError, match="another token"):
                process.result()


def test_process_0_listens_on_the_address_of_the_coordinator():
    """Not on all interfaces, unless the user asks for that."""
    assert rendezvous.bind_address(Launch("127.0.0.1:81", 2, 0), seconds=1, environ={}) == "127.0.0.1:81"
    assert rendezvous.bind_address(Launch("[::1]:81", 2, 0), seconds=1, environ={}) == "[::1]:81"
    given = {"JAX_COORDINATOR_BIND_ADDRESS": "[::]:81"}
    assert rendezvous.bind_address(Launch("127.0.0.1:81", 2, 0), seconds=1, environ=given) == "[::]:81"
    with pytest.raises(HostError, match="cannot resolve the coordinator's host 'no.invalid'"):
        rendezvous.bind_address(Launch("no.invalid:81", 2, 0), seconds=0, environ={})


def test_a_host_name_that_resolves_to_loopback_is_replaced(monkeypatch):
    """Debian resolves a host's own name to 127.0.1.1, where no other host could connect."""
    monkeypatch.setattr(rendezvous, "_resolve", lambda address: "127.0.1.1")
    assert not rendezvous.with_routable_address(Launch("node:81", 2, 0)).address.startswith("127.0.1.1")
    for address in ("localhost:81", "127.0.0.1:81", "[::1]:81"):
        assert rendezvous.with_routable_address(Launch(address, 2, 0)).address == address


def test_token():
    """From the environment, or the launcher's job; processes started by flags on several hosts must have one."""
    far, near = Launch("192.0.2.1:81", 2, 0), Launch("127.0.0.1:81", 2, 0)
    assert rendezvous.token(far, {"QWEN2_JAX_HOSTS_TOKEN": "abc"}) == b"abc"
    assert rendezvous.token(Launch("192.0.2.1:81", 2, 0, how="Slurm"), {"SLURM_JOB_ID": "7"}) == b"7"
    assert rendezvous.token(near, {})
    with pytest.raises(HostError, match="several hosts need a shared token: set QWEN2_JAX_HOSTS_TOKEN to the same"):
        rendezvous.token(far, {})
