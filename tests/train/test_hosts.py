# SPDX-License-Identifier: Apache-2.0
"""train.py as two real processes: trains what one process trains, and goes on after either was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_run import config_file

ROOT = Path(__file__).parents[2]
CPU = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
TWO_DEVICES = CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def losses(folder):
    """[(step, loss)] of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(folder):
    return {path.name: path.read_bytes() for path in (folder / "hf").glob("*.safetensors")}


@pytest.mark.slow
def test_two_processes_are_one_and_survive_each_others_death(corpus, tmp_path):
    """Process 1 is killed, and in the next start process 0, which coordinates; the third one ends the run.

    Losses and weights are those of two processes that nobody disturbed and, to the last bit, those of one process with
    two devices.
    """
    file = config_file(corpus, tmp_path, "steps=60, checkpoints=Checkpointing(every_steps=5)")
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    work = tmp_path / "work"
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_host.py"), "--work", str(work), "--kills", "2"]
    command += ["--command", f"{sys.executable} train.py {file}", "--host-timeout", "8"]
    done = subprocess.run(command, env=CPU | kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 kills survived" in done.stdout
    alone = tmp_path / "alone"
    command = [sys.executable, "train.py", str(file), "--out", str(alone)]
    one = subprocess.run(command, cwd=ROOT, env=TWO_DEVICES, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    assert len(losses(alone)) == 60
    assert losses(work / "whole") == losses(work / "killed") == losses(alone)
    assert weights(work / "whole") == weights(work / "killed") == weights(alone) != {}


def two(file, *, second=()):
    """Starts it as two processes; `second` are more flags for the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "train.py", str(file), "--coordinator", address, "--processes", "2", "--process"]
    how = {"cwd": ROOT, "env": CPU, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(i), *(second if i else ())], **how) for i in range(2)]


def test_two_processes_train_what_one_trains_and_stop_together(corpus, tmp_path):
    """SIGTERM to process 1: both save the same step and end with 0, and process 0 tells of it. Up to there, the losses
    are to the last bit those of one process with two devices."""
    files = []
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        files.append(config_file(corpus, tmp_path / name, "steps=100000"))
    out = tmp_path / "two" / "out"
    started = two(files[0])
    try:
        end = time.monotonic() + 300
        while not losses(out) and time.monotonic() < end:
            assert [process.poll() for process in started] == [None, None]
            time.sleep(0.1)
        started[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    assert "which is saved; resume with the same command" in told[0]
    assert "step" not in told[1]
    last = losses(out)[-1][0]
    assert (out / "checkpoints" / str(last)).is_dir()
    command = [sys.executable, "train.py", str(files[1]), "--steps", str(last)]
    one = subprocess.run(command, cwd=ROOT, env=TWO_DEVICES, capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "one" / "out") == losses(out)


@pytest.mark.slow  # their losses: above
def test_two_processes_export_what_one_exports(corpus, tmp_path):
    """To the last bit; and each process holds half of the devices."""
    files = []
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        files.append(config_file(corpus, tmp_path / name, "steps=3"))
    started = two(files[0])
    try:
        one = subprocess.run(
            [sys.executable, "train.py", str(files[1])], cwd=ROOT, env=TWO_DEVICES, capture_output=True
        )
        told = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [one.returncode, *(process.returncode for process in started)] == [0, 0, 0], (one.stderr, told)
    assert len(losses(tmp_path / "one" / "out")) == 3
    assert losses(tmp_path / "two" / "out") == losses(tmp_path / "one" / "out")
    assert weights(tmp_path / "two" / "out") == weights(tmp_path / "one" / "out") != {}


@pytest.mark.slow  # quick: processes that disagree, tests/parallel/test_processes.py
def test_hosts_that_were_told_something_else(corpus, tmp_path):
    started = two(config_file(corpus, tmp_path, "steps=3"), second=["--optim.lr", "0.02"])
    try:
        told = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, 2], told
    host = socket.gethostname()
    for text in told:
        assert (
            f"hosts disagree: setting optim.lr is 0.01 on process 0 on {host} and 0.02 on process 1 on {host}" in text
        )
    assert not (tmp_path / "out").exists()
