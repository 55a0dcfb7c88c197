# SPDX-License-Identifier: Apache-2.0
"""Ends this process when another one has ended, in bounded time and with a message that says which and why.

A process whose peer is gone waits for ever in a collective, or gets an error that blames a socket. Python cannot
interrupt that wait, so threads of ours watch, say what happened, and end the process with os._exit.

Whether a process lives is found by jax's coordination service from signs of life that C++ threads send: long pauses of
Python do not matter. By itself it would abort every process when one is missing, with a page of C++; in its recoverable
mode it tells instead. Only when the service's own process is gone jax aborts the others; what it would say then is said
by a handler of that signal.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from typing import Any

from qwen2_jax.parallel.hosts.barriers import PREFIX
from qwen2_jax.parallel.hosts.group import LOST, Group, processes_named
from qwen2_jax.parallel.hosts.launch import Launch

ENDED, HEARD, PLACES = f"{PREFIX}ended/", f"{PREFIX}heard/", f"{PREFIX}places/"
PERIOD = 1.0  # seconds between two looks at what the others say
LAST_WORDS = 15.0  # seconds for which process 0, which holds what is said, stays so that the others can hear it
MOST = 2000  # characters of a reason


class Watcher:
    """Watches the other processes of a group until it is stopped.

    goes_on: a sentence on what to do after another process was lost. stall: seconds after which a job counts as stuck
    in which no process began anything; 0: never.
    """

    def __init__(self, group: Group, launch: Launch, client: Any, *, goes_on: str, stall: float):
        self.group, self.launch, self.client, self.goes_on, self.stall = group, launch, client, goes_on, stall
        self._places: list[tuple[str, str]] = []
        self._moved = time.monotonic()  # when the places were others
        self._stopping = threading.Event()
        self._ending = threading.Lock()  # held by who ends the process: one message, one exit code
        self._threads = [threading.Thread(target=self._listen, name="hosts: listen", daemon=True)]
        if hasattr(client, "get_live_nodes"):
            self._threads.append(threading.Thread(target=self._look, name="hosts: look", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        if self.group.process:
            self._catch_aborts()

    def stop(self) -> None:
        """Watches no longer. One look may still be under way, which ends when the other processes stop, too."""
        self._stopping.set()
        self._threads[0].join()

    def release(self) -> None:
        """Leaves aborts alone again."""
        if self.group.process:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL

    def fail(self, code: int, reason: str) -> None:
        """Tells the others that this process ends, and stays as long as they need it to hear that."""
        self._ending.acquire()  # and keeps it: from now on this process ends by what happened here
        self._say(self.group.process, code, f"{self.group.named(self.group.process)} has ended: {reason[:MOST]}")
        self._stay()

    def wait(self) -> None:
        """Waits for as long as it may take to find out that another process is gone, which then ends this one."""
        time.sleep(self.launch.heartbeat + 3 * PERIOD)

    # ---- the threads

    def _look(self) -> None:
        """Asks who is alive. The answer comes when all who are have asked."""
        everyone = list(range(self.group.processes))
        first: dict[int, int] | None = None
        while not self._stopping.is_set():
            try:
                alive = self.client.get_live_nodes(everyone)  # process -> a number for its life
            except RuntimeError:  # the service is gone, which the other thread finds out
                return
            first = first or alive
            gone = [i for i in everyone if i not in alive or alive[i] != first.get(i)]  # or started anew
            if gone and not self._stopping.is_set():
                for process in gone:
                    self._say(process, LOST, "")
                return
            self._stopping.wait(PERIOD)

    def _listen(self) -> None:
        """Asks whether a process has said that it ends, and now and then whether anything moves."""
        missed, asked = 0, time.monotonic()
        while not self._stopping.wait(PERIOD):
            try:
                ended = self.client.key_value_dir_get(ENDED)
                if self.stall and not ended and time.monotonic() > asked + self.stall / 20:
                    asked = time.monotonic()
                    self._ask_for_moves()
            except RuntimeError:
                missed += 1
                if missed > 2 and not _reachable(self.launch.address):
                    self._end(self._without_coordinator(), LOST, said=False)
                continue
            missed = 0
            if ended and not self._stopping.is_set():
                self._end(*self._told({int(key.rpartition("/")[2]): json.loads(text) for key, text in ended}))

    def _ask_for_moves(self) -> None:
        """Every process says where it is; the first one compares that with what they said before."""
        moves = f"{self.group.moves}, at {time.monotonic()}" if self.group.unhurried else str(self.group.moves)
        self._keep(f"{PLACES}{self.group.process}", f"{moves}\n{self.group.place}")
        if self.group.first:
            places = sorted(self.client.key_value_dir_get(PLACES))
            if places != self._places:
                self._places, self._moved = places, time.monotonic()
            elif time.monotonic() > self._moved + self.stall:
                self._say(self.group.process, LOST, self._stuck(places))

    def _catch_aborts(self) -> None:
        def aborted(_: int) -> None:
            if not self._stopping.is_set() and not _reachable(self.launch.address):
                self._end(self._without_coordinator(), LOST, said=False)
            # An abort for another reason: it goes on when this returns.

        # Not signal.signal: its handlers run in the main thread, which may wait for a collective, and abort() returns
        # to no Python. This one runs in the thread that aborts.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    # ---- what is said

    def _told(self, ended: dict[int, dict[str, Any]]) -> tuple[str, int]:
        """(message, exit code) for processes that have ended."""
        for _, about in sorted(ended.items()):
            if about["reason"]:
                return about["reason"], about["code"]
        gone = " and ".join(self.group.named(i) for i in sorted(ended)[:8])
        return (
            f"{gone} {'is' if len(ended) == 1 else 'are'} gone, without a sign of life for {self.launch.heartbeat} s: "
            f"killed, crashed, or the machine is. {self.goes_on}",
            LOST,
        )

    def _without_coordinator(self) -> str:
        return (
            f"{self.group.named(0)}, the coordinator at {self.launch.address}, is gone: killed, crashed, or the "
            f"machine is. {self.goes_on}"
        )

    def _stuck(self, places: list[tuple[str, str]]) -> str:
        where: dict[str, list[int]] = {}
        for key, text in places:
            where.setdefault(text.partition("\n")[2], []).append(int(key.rpartition("/")[2]))
        said = "; ".join(
            f"{processes_named(who)}: {place}" for place, who in sorted(where.items(), key=lambda item: len(item[1]))
        )
        return f"nothing has moved on any host for {self.stall:.0f} s ({said}). {self.goes_on}"

    def _say(self, process: int, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # somebody has said it, or nobody is left to hear it
            self.client.key_value_set(f"{ENDED}{process}", json.dumps({"code": code, "reason": reason}))

    def _keep(self, key: str, value: str) -> None:
        self.client.key_value_set(key, value, allow_overwrite=True)

    def _stay(self) -> None:
        """Process 0 waits until the living have heard how this ends; the others say that they have."""
        end = time.monotonic() + LAST_WORDS
        try:
            self._keep(f"{HEARD}{self.group.process}", "")
            while self.group.first and time.monotonic() < end:
                ended = {key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(ENDED)}
                heard = {key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(HEARD)}
                if len(ended | heard) == self.group.processes:
                    time.sleep(0.5)  # who has just said so is about to leave
                    return
                time.sleep(0.1)
        except RuntimeError:  # the service is gone
            pass

    def _end(self, message: str, code: int, *, said: bool = True) -> None:
        if not self._ending.acquire(blocking=False):  # this process ends already
            return
        text = f"error: {message}\n({self.group.named(self.group.process)}, one of {self.group.processes}, stops)\n"
        show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress display may have hidden it
        os.write(2, (show_cursor + text).encode("utf-8", "replace"))
        if said:  # where the service is gone, its client's locks may be held by the thread that aborts
            self._stay()
        os._exit(code)


def _reachable(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3.0).close()
    except OSError:
        return False
    return True
