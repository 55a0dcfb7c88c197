# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and the first Ctrl-C as requests to save and stop: clusters send SIGTERM before they take a machine away."""

import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


class Preemption:
    """While its block runs, SIGTERM sets a flag instead of ending the process; so does every further one.

    The loop asks `requested` after each step, saves, and leaves. The first Ctrl-C (SIGINT) is a SIGTERM; the second
    raises KeyboardInterrupt, as it does where something else than Python's own handler hears SIGINT. Where several
    processes run, jax's preemption service is asked: it hears SIGTERM in any of them and names a step that all will
    reach, so that all save the same one. Use it from the main thread, after jax.distributed.initialize.
    """

    SAID = b"\nstopping: the step that runs is finished and saved; Ctrl-C again stops at once, without saving\n"

    def __init__(self) -> None:
        self._flag = False
        # jax's service has a handler of its own, which ours would displace: Python does not see it and cannot chain.
        self._by_jax = jax.process_count() > 1 and jax.config.jax_enable_preemption_service

    def __enter__(self) -> "Preemption":
        if not self._by_jax:
            self._before = signal.signal(signal.SIGTERM, self._set)
        self._hears_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._hears_ctrl_c:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._hears_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._by_jax:
            # None: the handler was not set from Python and cannot be set again from here
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self._flag = True

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, self.SAID)  # a signal may come during a print, which another print would disturb
        signal.raise_signal(signal.SIGTERM)  # also heard by jax's service, and so by all processes

    def requested(self, step: int) -> bool:
        """Whether to save and stop now. Every process asks after every step and gets the same answer."""
        if self._by_jax:
            return multihost_utils.reached_preemption_sync_point(step)
        if jax.process_count() > 1:
            return bool(multihost_utils.process_allgather(np.array(self._flag)).any())
        return self._flag
