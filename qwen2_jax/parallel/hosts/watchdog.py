# SPDX-License-Identifier: Apache-2.0
"""Stops this process within bounded time when another one has ended, with a message that names it and the reason.

A process whose peer was lost waits forever in a collective, or gets an unrelated socket error. Python cannot interrupt
that wait, so threads of this module watch the peers, print the reason, and end the process with os._exit.

jax's coordination service detects lost processes by heartbeats, which C++ threads send: long pauses of Python do not
matter. By default it aborts every process when one is lost, with a C++ stack trace; in recoverable mode it reports the
loss instead. When process 0, which runs the service, is lost, jax still aborts the others; a handler of SIGABRT prints
our message then.
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

ENDED, ACKNOWLEDGED, ACTIVITIES = f"{PREFIX}ended/", f"{PREFIX}acknowledged/", f"{PREFIX}activities/"
PERIOD = 1.0  # seconds between two polls
SHUTDOWN = 15.0  # seconds that process 0, which runs the service, waits for the others to read the reason
MOST = 2000  # characters of a reason


class Watcher:
    """Watches the other processes of a group until it is stopped.

    goes_on: a sentence on what to do after another process was lost. stall: seconds without a new activity in any
    process after which the job counts as stuck; 0: no limit.
    """

    def __init__(self, group: Group, launch: Launch, client: Any, *, goes_on: str, stall: float):
        self.group, self.launch, self.client, self.goes_on, self.stall = group, launch, client, goes_on, stall
        self._activities: list[tuple[str, str]] = []
        self._changed = time.monotonic()  # when the activities last changed
        self._stopping = threading.Event()
        self._ending = threading.Lock()  # held by the thread that ends the process: one message, one exit code
        self._threads = [threading.Thread(target=self._poll_ended, name="hosts: poll ended", daemon=True)]
        if hasattr(client, "get_live_nodes"):
            self._threads.append(threading.Thread(target=self._poll_alive, name="hosts: poll alive", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        if self.group.process:
            self._catch_aborts()

    def stop(self) -> None:
        """Stops watching. One poll may still be running; it returns when the other processes stop, too."""
        self._stopping.set()
        self._threads[0].join()

    def release(self) -> None:
        """Restores the default handler of SIGABRT."""
        if self.group.process:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL

    def fail(self, code: int, reason: str) -> None:
        """Notifies the others that this process ends, and waits until they have read it."""
        self._ending.acquire()  # never released: no other thread may report another reason
        self._publish_end(
            self.group.process, code, f"{self.group.named(self.group.process)} has ended: {reason[:MOST]}"
        )
        self._acknowledge()

    def wait(self) -> None:
        """Waits as long as it can take to detect a lost process, in which case this process ends."""
        time.sleep(self.launch.heartbeat + 3 * PERIOD)

    # ---- the threads

    def _poll_alive(self) -> None:
        """Asks the service which processes are alive; it answers when all of those have asked."""
        everyone = list(range(self.group.processes))
        first: dict[int, int] | None = None
        while not self._stopping.is_set():
            try:
                alive = self.client.get_live_nodes(everyone)  # process -> incarnation
            except RuntimeError:  # the service is lost; the other thread detects that
                return
            first = first or alive
            gone = [i for i in everyone if i not in alive or alive[i] != first.get(i)]  # or restarted
            if gone and not self._stopping.is_set():
                for process in gone:
                    self._publish_end(process, LOST, "")
                return
            self._stopping.wait(PERIOD)

    def _poll_ended(self) -> None:
        """Polls whether a process has published its end and, less often, whether any process makes progress."""
        missed, asked = 0, time.monotonic()
        while not self._stopping.wait(PERIOD):
            try:
                ended = self.client.key_value_dir_get(ENDED)
                if self.stall and not ended and time.monotonic() > asked + self.stall / 20:
                    asked = time.monotonic()
                    self._check_progress()
            except RuntimeError:
                missed += 1
                if missed > 2 and not _reachable(self.launch.address):
                    self._end(self._coordinator_lost(), LOST, acknowledge=False)
                continue
            missed = 0
            if ended and not self._stopping.is_set():
                self._end(*self._message_of({int(key.rpartition("/")[2]): json.loads(text) for key, text in ended}))

    def _check_progress(self) -> None:
        """Publishes this process's activity; process 0 compares the activities of all with those of the last check."""
        group = self.group
        count = f"{group.started}, at {time.monotonic()}" if group.no_time_limit else str(group.started)
        self._set(f"{ACTIVITIES}{group.process}", f"{count}\n{group.activity}")
        if group.first:
            activities = sorted(self.client.key_value_dir_get(ACTIVITIES))
            if activities != self._activities:
                self._activities, self._changed = activities, time.monotonic()
            elif time.monotonic() > self._changed + self.stall:
                self._publish_end(group.process, LOST, self._stuck(activities))

    def _catch_aborts(self) -> None:
        def aborted(_: int) -> None:
            if not self._stopping.is_set() and not _reachable(self.launch.address):
                self._end(self._coordinator_lost(), LOST, acknowledge=False)
            # An abort for another reason continues when this returns.

        # Not signal.signal: its handlers run in the main thread, which may be waiting in a collective, and abort()
        # never returns to Python. This handler runs in the thread that aborts.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    # ---- messages

    def _message_of(self, ended: dict[int, dict[str, Any]]) -> tuple[str, int]:
        """(message, exit code) for processes that have ended."""
        for _, about in sorted(ended.items()):
            if about["reason"]:
                return about["reason"], about["code"]
        gone = " and ".join(self.group.named(i) for i in sorted(ended)[:8])
        return (
            f"{gone} {'is' if len(ended) == 1 else 'are'} lost, without a heartbeat for {self.launch.heartbeat} s: "
            f"the process was killed or crashed, or its host is down. {self.goes_on}",
            LOST,
        )

    def _coordinator_lost(self) -> str:
        return (
            f"{self.group.named(0)}, the coordinator at {self.launch.address}, is lost: killed or crashed, or "
            f"its host is down. {self.goes_on}"
        )

    def _stuck(self, activities: list[tuple[str, str]]) -> str:
        by_activity: dict[str, list[int]] = {}
        for key, text in activities:
            by_activity.setdefault(text.partition("\n")[2], []).append(int(key.rpartition("/")[2]))
        listed = "; ".join(
            f"{processes_named(who)}: {activity}"
            for activity, who in sorted(by_activity.items(), key=lambda item: len(item[1]))
        )
        return f"no process has made progress for {self.stall:.0f} s ({listed}). {self.goes_on}"

    def _publish_end(self, process: int, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # published already, or the service is lost
            self.client.key_value_set(f"{ENDED}{process}", json.dumps({"code": code, "reason": reason}))

    def _set(self, key: str, value: str) -> None:
        self.client.key_value_set(key, value, allow_overwrite=True)

    def _acknowledge(self) -> None:
        """Acknowledges the reason for the end; process 0 waits until all living processes have done so."""
        end = time.monotonic() + SHUTDOWN
        try:
            self._set(f"{ACKNOWLEDGED}{self.group.process}", "")
            while self.group.first and time.monotonic() < end:
                ended = {key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(ENDED)}
                acknowledged = {key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(ACKNOWLEDGED)}
                if len(ended | acknowledged) == self.group.processes:
                    time.sleep(0.5)  # the last ones to acknowledge are about to exit
                    return
                time.sleep(0.1)
        except RuntimeError:  # the service is lost
            pass

    def _end(self, message: str, code: int, *, acknowledge: bool = True) -> None:
        if not self._ending.acquire(blocking=False):  # another thread is ending this process
            return
        text = f"error: {message}\n({self.group.named(self.group.process)}, one of {self.group.processes}, stops)\n"
        show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress display may have hidden it
        os.write(2, (show_cursor + text).encode("utf-8", "replace"))
        if acknowledge:  # not if the service is lost: the thread that aborts may hold its client's locks
            self._acknowledge()
        os._exit(code)


def _reachable(address: str) -> bool:
    """Whether something accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3.0).close()
    except OSError:
        return False
    return True
