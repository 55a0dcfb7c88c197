# SPDX-License-Identifier: Apache-2.0
"""Runs a script in several real processes that jax.distributed joins on this machine: the hosts of a small pod."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import json, os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if int(sys.argv[3]) > 1:
    jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[3]), process_id=int(sys.argv[2]))
from pathlib import Path
root, me = Path(sys.argv[4]), jax.process_index()

def bytes_read():
    "Of all files, by this process since it began: what the system counts, whoever in it reads."
    return int(Path("/proc/self/io").read_text().split()[1])

def bytes_written():
    return int(Path("/proc/self/io").read_text().split()[3])

def tell(**found):
    print(json.dumps(found), flush=True)
"""


def run(script: str, root: Path, *, count: int = 2, devices: int = 2, timeout: int = 120) -> list[dict]:
    """What each process told: the last `tell(name=value)` of `script`, which finds `root` and `me`, its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", START + script, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(rank), str(count), str(root)], env=environment, **pipes)
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "\n".join(error[-3000:] for _, error in outputs)
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
