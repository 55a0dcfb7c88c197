# SPDX-License-Identifier: Apache-2.0
"""A process that calls reward functions, so that it can be ended when one of them does not return.

Requests and replies are lines of JSON on what was the standard input and output: nothing is pickled. The process lives
as long as its input stays open, which is as long as the process that started it.
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

# sys.path is the parent's, so that modules are found which it finds.
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qwen2_jax.rewards import worker; worker.main()"
LOADING = 300.0  # seconds that importing the functions may take


class Lost(Exception):
    """The worker ended or was ended before it replied; the message is the reason."""


class Slow(Lost):
    """It was ended because its time was over."""


class Worker:
    """A worker process with its functions loaded. One call at a time."""

    def __init__(self, references: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # the accelerator's memory is the training's
            start_new_session=True,  # a group of its own, to be ended with all it started
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
        """call.call, in the worker. Raises as that does, and Lost when there is no reply; the worker has ended then."""
        self.wait()
        scores, wrong = self._ask([reference, columns, options], seconds)
        return scores, wrong

    @property
    def ended(self) -> bool:
        """Whether the process is no more, by whatever cause."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Ends the process and what it started; a call that waits for it raises Lost."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends the process and closes its pipes. No call may be waiting."""
        if not self.ended:
            self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that was not written to its end
                pipe.close()

    def _ask(self, request: Any, seconds: float) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = json.dumps(request, default=_plain)
        over = threading.Event()

        def stop() -> None:
            over.set()
            self.kill()  # writing and reading come to an end by that

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
        if over.is_set():  # even if the reply came just before
            self.end()
            raise Slow(f"it took longer than {seconds:g} s and was ended")
        if not line.endswith("\n"):
            self.end()
            raise Lost(f"it ended the process it ran in (exit code {self._process.returncode})")
        kind, value = json.loads(line)
        if kind == "mistake":
            raise UserError(value)
        if kind == "failed":
            raise Failed(value)
        return value


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays and numpy's numbers become lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    kind = type(value).__name__
    raise UserError(f"reward functions cannot be given {validate.short(value)} of type {kind}: give JSON's types")


def main() -> None:
    """The worker process: the first request are references of functions, the others are calls of these."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what functions print does not mix with replies
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
    """Takes requests in, also while a function runs: the end of the input ends it."""
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a function that reads its input gets nothing
    for line in lines:
        requests.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)
