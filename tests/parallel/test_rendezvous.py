# SPDX-License-Identifier: Apache-2.0
"""Everybody is there, or all who are learn who is not."""

import concurrent.futures
import socket
import time

import pytest

from qwen2_jax.parallel.hosts import HostError, Launch
from qwen2_jax.parallel.hosts.rendezvous import call


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def called(launches, seconds):
    """What each gets, a list of names or an error's words. Later ones come first."""
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
    assert said[0].startswith(f"processes 1, 3 of 4 did not come to {address} within 2 s")


def test_another_number_of_processes(address):
    said = called([Launch(address, 2, 0), Launch(address, 3, 1)], 20)
    assert said[0] == said[1]
    assert "was told of 3 processes, and process 0 of 2: give all hosts the same --processes" in said[0]


def test_two_of_the_same_number(address):
    said = called([Launch(address, 3, i) for i in (0, 1, 1)], 20)
    assert len(set(said)) == 1
    assert "two processes say that they are process 1, on " in said[0]


def test_nobody_at_the_address(address):
    begin = time.monotonic()
    with pytest.raises(
        HostError, match=r"process 1 of 2 did not reach process 0 at 127.0.0.1:\d+ within 1 s .*refused"
    ):
        call(Launch(address, 2, 1), seconds=1)
    assert time.monotonic() - begin < 5


def test_the_port_is_taken(address):
    there = socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))
    with there, pytest.raises(HostError, match="process 0 cannot listen on .*use.*Choose another one"):
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
