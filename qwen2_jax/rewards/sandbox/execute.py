# SPDX-License-Identifier: Apache-2.0
"""Executes a Python program written by a model in a sandbox, which namespaces.py creates.

The program has read-only access to the interpreter, its packages and the system's libraries, and an empty writable
folder in memory. It has no other files, no environment, no network, no keys, sees no other process, may not make the
system calls that namespaces.py denies, and its resources are limited. The sandbox uses Linux namespaces, which need no
privileges and no installation on most machines, but which containers often forbid. It contains programs that a model
writes during training; it is no defence against kernel exploits.
"""

import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError

SCRIPT = Path(__file__).with_name("namespaces.py")
STARTING = 10.0  # seconds for creating the sandbox, in addition to the program's limit
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# The answer runs first, then its tests; printing a random word proves that both completed, which an exit code does not:
# the answer may call exit(0).
TESTED = """
import sys
program, tests, word = sys.stdin.read().split(sys.argv[1])
names = {"__name__": "answer"}
exec(compile(program, "answer", "exec"), names)
exec(compile(tests, "tests", "exec"), names)
sys.__stdout__.write(word)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program."""

    seconds: float = 5.0  # wall time; CPU time is limited to one second more
    memory: int = 2**30  # bytes of address space of each process: together up to processes * memory
    disk: int = 2**24  # bytes of files, and of output
    processes: int = 16  # and threads

    def __post_init__(self):
        validate.number(self, "sandbox", ("seconds",), float, 0.0)
        validate.number(self, "sandbox", ("memory", "disk", "processes"), int, 1)


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a program ended."""

    exit_code: int | None  # 128 + N: killed by signal N; None: time limit
    output: str  # stdout
    errors: str  # stderr


def run(program: str, stdin: str = "", limits: Limits = Limits(), *, unsandboxed: bool = False) -> Ran:
    """Executes a Python program. Raises UserError that names what is missing if no sandbox can be created.

    unsandboxed: with limits of time, memory and file size and an empty environment, but with access to the network and
    the user's files. Only for trusted programs, or in a disposable environment.
    """
    folder = tempfile.mkdtemp(prefix="qwen2-jax-sandbox-")
    try:
        return _run(program, stdin, limits, Path(folder), unsandboxed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def passes(program: str, tests: str, limits: Limits = Limits(), *, unsandboxed: bool = False) -> bool:
    """Whether the program and then the tests, in the same process and with the same names, raise nothing."""
    word, border = secrets.token_hex(16), secrets.token_hex(16)
    driver = TESTED.replace("sys.argv[1]", repr(border))
    ran = run(driver, border.join([program, tests, word]), limits, unsandboxed=unsandboxed)
    return ran.exit_code == 0 and ran.output.endswith(word)


def _run(program: str, stdin: str, limits: Limits, folder: Path, unsandboxed: bool) -> Ran:
    prefixes = [path for prefix in (sys.prefix, sys.base_prefix) for path in (prefix, os.path.realpath(prefix))]
    job: dict[str, Any] = {
        "bare": unsandboxed,
        "folder": str(folder),
        "python": sys.executable,
        "program": program,
        "seen": [*dict.fromkeys(path for path in (*SYSTEM, *prefixes, *DEVICES) if os.path.exists(path))],
        **dataclasses.asdict(limits),
    }
    # The only variable that is passed on; the interpreter may need it.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    if sys.platform != "linux" and not unsandboxed:
        raise UserError(_refusal("it needs Linux"))
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as task,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as report,
    ):
        given.write(stdin.encode("utf-8", "surrogatepass"))
        task.write(json.dumps(job).encode())
        given.seek(0)
        task.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), str(task.fileno()), str(report.fileno())],
            stdin=given, stdout=output, stderr=errors, pass_fds=(task.fileno(), report.fileno()),
            env=kept, cwd="/", start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(STARTING + limits.seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result, out, err = (_text(file, limits.disk) for file in (report, output, errors))
    what, _, value = result.partition("\n")[0].partition(" ")
    if what not in ("ended", "over"):
        raise UserError(_refusal(value or f"it did not start ({err[-200:]})"))
    return Ran(int(value) if what == "ended" else None, out, err)


def _text(file: Any, most: int) -> str:
    file.seek(0)
    return file.read(most).decode("utf-8", "replace")


def _refusal(what: str) -> str:
    return (
        f"no sandbox for programs written by a model can be created here: {what}. Run on a machine or in a container "
        'that allows namespaces, or give options={"unsandboxed": True}, only in a disposable environment'
    )
