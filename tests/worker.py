# SPDX-License-Identifier: Apache-2.0
"""A process with several CPU devices that calls functions of test scripts, one after another.

jax is imported once, and what a script keeps from one call to the next is made once. The programs are compiled without
LLVM's optimizations, which is most of the time of such tests; how XLA divides them over devices is as ever.
"""

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

TESTS = Path(__file__).parent


class Worker:
    """As a context: ends with it. Calls raise AssertionError with the traceback of what failed."""

    def __init__(self, devices: int = 8):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        path = os.pathsep.join(map(str, (TESTS, TESTS / "train", TESTS / "infer")))
        self.environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self._end()

    def __call__(self, module: str, function: str, *arguments, timeout: float = 600) -> None:
        """Calls a function of a module in tests/, tests/train/ or tests/infer/ with arguments that JSON can hold."""
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps([module, function, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        answer = self.process.stdout.readline() if ready else b""
        if not answer:  # it hangs or has crashed; the next call starts another one
            what = "ended" if ready else f"did not answer within {timeout:.0f} s"
            raise AssertionError(f"the worker {what}; it said: {self._end()[-3000:]}")
        problem = json.loads(answer)
        assert problem is None, problem

    def _start(self) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  it is open as long as the process is there
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen([sys.executable, __file__], env=self.environment, **pipes)

    def _end(self) -> str:
        """What it said on stderr."""
        self.process.kill()
        self.process.communicate()
        self.process = None
        with self.said:
            self.said.seek(0)
            return self.said.read().decode(errors="replace")


def _serve() -> None:
    import jax

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what scripts print is no answer
    for line in sys.stdin:
        module, function, *arguments = json.loads(line)
        try:
            getattr(importlib.import_module(module), function)(*arguments)
            problem = None
        except Exception:  # whatever it is: the test that asked shall say it
            problem = traceback.format_exc()
        jax.clear_caches()
        answers.write(json.dumps(problem) + "\n")


if __name__ == "__main__":
    _serve()
