# SPDX-License-Identifier: Apache-2.0
"""Real processes whose settings differ, that fail, stall, are missing or are killed. No devices: they start fast."""

import os
import socket
import subprocess
import sys
import time

import pytest

from few import slow

PROGRAM = """
import os, signal, sys, time
from qwen2_jax.parallel import hosts
from qwen2_jax.errors import UserError

mode, count, address, process = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def main():
    launch = hosts.Launch(address, count, process, heartbeat=6)
    try:
        with hosts.joined(launch, goes_on="Once more", stall=4 if mode == "stuck" else 0) as group:
            group.at(f"step {3 + process}")
            if mode == "fine":
                hosts.check(group, {"same": {"a": 1}})
                hosts.barrier("fine")
                print("fine", flush=True)
                return 0
            if mode == "disagree":
                hosts.check(group, {"optim": {"lr": 0.2 if process == 1 else 0.1}, "out": "same"})
            if mode == "absent" and process != 2:
                hosts.barrier("before step 5", seconds=2)
            if mode == "uncompared" and process != 2:
                hosts.differences("comparing data", {"a": "b"}, seconds=2)
            if mode == "error" and process == 1:
                raise UserError("no such file: chats.jsonl")
            if mode == "bug" and process == 0:
                raise TypeError("3 is not a string")
            if mode == "killed" and process == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "coordinator" and process == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0

hosts.leave(main())
"""
FATES = [
    ("fine", 2, {}, {0: 0, 1: 0}, ""),
    ("disagree", 3, {}, {0: 2, 1: 2, 2: 2}, "setting optim.lr is 0.1 on processes 0, 2 and 0.2 on process 1 on "),
    ("killed", 2, {}, {0: 75}, "process 1 on HOST is lost, without a heartbeat for 6 s: the process was killed "),
    *slow(
        ("error", 3, {}, {0: 2, 2: 2}, "process 1 on HOST has ended: no such file: chats.jsonl"),
        ("stuck", 2, {}, {0: 75, 1: 75}, "no process has made progress for 4 s (process 0: step 3; process 1: step 4)"),
        (
            "fine",
            2,
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"},
            {0: 2, 1: 2},
            "$XLA_FLAGS is absent on process 0 on HOST and --xla_cpu_enable_fast_math=false on process 1 on HOST",
        ),
        ("absent", 3, {}, {0: 2, 1: 2, 2: 2}, "process 2 did not reach the barrier 'before step 5' within 2 s"),
        ("uncompared", 3, {}, {0: 2, 1: 2, 2: 2}, "process 2 did not reach the barrier 'comparing data' within 2 s"),
        ("bug", 3, {}, {1: 1, 2: 1}, "process 0 on HOST has ended: TypeError: 3 is not a string"),
        ("coordinator", 2, {}, {1: 75}, "process 0 on HOST, the coordinator at ADDRESS, is lost: killed "),
    ),
]


@pytest.mark.parametrize(("mode", "count", "last_has", "codes", "message"), FATES, ids=lambda x: str(x)[:12])
def test_how_several_processes_end(mode, count, last_has, codes, message):
    """codes: exit codes of the processes whose end matters; each of them says the message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    environ.pop("XLA_FLAGS", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mode, str(count), address, str(i)],
            env=environ | (last_has if i == count - 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    begin = time.monotonic()
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    message = message.replace("HOST", socket.gethostname()).replace("ADDRESS", address)
    for i, code in codes.items():
        assert started[i].returncode == code, outputs[i]
        assert message in outputs[i][1] or not code, outputs[i]
        assert "fine" in outputs[i][0] or code
        if code == 75:
            assert "Once more." in outputs[i][1]
    assert time.monotonic() - begin < 60
