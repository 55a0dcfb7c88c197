# SPDX-License-Identifier: Apache-2.0
"""A worker process that calls reward functions, so that a function that hangs can be killed.

Requests and replies are lines of JSON over stdin and stdout; nothing is pickled. The process exits when its stdin
closes, which is when its parent ends.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.rewards.call import Failed, call, load
from qwen2_jax.rewards.reward_config import Function

# Uses the parent's sys.path, to import the same modules.
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qwen2_jax.rewards import worker; worker.main()"
LOADING = 300.0  # time limit for importing the functions, seconds


class Lost(Exception):
    """The worker exited or was killed before it replied; the message is the reason."""


class Slow(Lost):
    """The worker was killed at its time limit."""


class Worker:
    """A worker process with its functions loaded. One call at a time."""

    def __init__(self, references: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # leaves the accelerator's memory to training
            start_new_session=True,  # its own process group, killed with its children
        )  # fmt: skip
        self._references = references
        self._ready = False

    def wait(self) -> None:
        """Waits until the functions are loaded. Raises UserError when one cannot be."""
        if not self._ready:
            try:
                self._ask(self._references, LOADING)
            except Lost as why:
                raise UserError(f"reward functions {', '.join(self._references)}: while loading, {why}") from None
            self._ready = True

    def call(
        self, reference: str, columns: dict[str, Any], options: dict[str, Any], seconds: float
    ) -> tuple[list[float | None], list[str]]:
        """Runs call.call in the worker. Raises the same errors, and Lost if the worker exited without a reply."""
        self.wait()
        scores, wrong = self._ask([reference, columns, options], seconds)
        return scores, wrong

    @property
    def ended(self) -> bool:
        """Whether the process has exited."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kills the process and its children; a waiting call raises Lost."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills the process and closes its pipes. No call may be waiting."""
        if not self.ended:
            self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # an incomplete request
                pipe.close()

    def _ask(self, request: Any, seconds: float) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = json.dumps(request, default=_plain)
        over = threading.Event()

        def stop() -> None:
            over.set()
            self.kill()  # which unblocks writing and reading

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
            timer.join()
        if over.is_set():  # even if a reply arrived just before
            self.end()
            raise Slow(f"it took longer than {seconds:g} s and was killed")
        if not line.endswith("\n"):
            self.end()
            raise Lost(f"its process exited (exit code {self._process.returncode})")
        kind, value = json.loads(line)
        if kind == "mistake":
            raise UserError(value)
        if kind == "failed":
            raise Failed(value)
        return value


def _plain(value: Any) -> Any:
    """Converts arrays and numpy scalars to lists and numbers for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    kind = type(value).__name__
    raise UserError(f"reward functions get values that JSON has, not {validate.short(value)} of type {kind}")


def main() -> None:
    """The worker process: the first request lists the functions to load, later ones are calls."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps output of functions out of the replies
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    functions: dict[str, Function] = {}
    while True:
        request = json.loads(requests.get())
        try:
            if functions:
                reference, columns, options = request
                reply: list[Any] = ["done", call(functions[reference], columns, options)]
            else:
                functions = {reference: load(reference) for reference in request}
                reply = ["done", None]
        except UserError as mistake:
            reply = ["mistake", str(mistake)]
        except Failed as why:
            reply = ["failed", str(why)]
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _listen(requests: "queue.SimpleQueue[str]") -> None:
    """Reads requests, also while a function runs; kills the process at the end of the input."""
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # functions that read stdin get end of file
    for line in lines:
        requests.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)
