# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qwen2_jax import validate

# Waiting for data, sampling answers, training, saving, scoring, compiling, repeating what a crash lost, and whatever
# nobody named.
PHASES = ("data", "rollout", "step", "save", "evaluation", "compile", "lost", "other")
USEFUL = ("rollout", "step")

_compiled = 0


def _count(event: str, duration_secs: float, **_: Any) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def programs_compiled() -> int:
    """Programs that this process compiled or read from a cache; a number that grows in a steady run is a bug."""
    return _compiled


class Goodput:
    """A clock that is always in one phase, so that the seconds of all phases add up to the time that passed.

        with goodput("data", behind=loss): batch = next(batches)
        with goodput("step"): state, metrics = step(state, batch)

    A phase inside a phase takes its time away from the outer one. A phase in which jax compiled counts as "compile".
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now, self._phase, self._since = now, "other", now()

    @contextlib.contextmanager
    def __call__(self, phase: str, behind: Any = None) -> Iterator[None]:
        """Counts what happens inside as `phase`, one of PHASES.

        behind: a jax array that the devices were making when this began. If they still are when it ends, nobody waited
        for what happened inside, and the time counts as "step". An exposed wait counts in full, though the devices may
        have been busy at its beginning: the share of "data" is an upper bound.
        """
        validate.choice("phase", phase, PHASES)
        outer, programs = self._phase, programs_compiled()
        self._charge(outer)
        self._phase = phase
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            hidden = behind is not None and not behind.is_ready()
            self._charge("compile" if programs_compiled() > programs else "step" if hidden else phase)
            self._phase = outer

    def total(self) -> float:
        """Seconds since the run began, over all its processes, except those between a stop and the next start."""
        self._charge(self._phase)
        return sum(self.seconds.values())

    def share(self) -> float:
        """The goodput: share of the time that went into training, or into sampling what is trained on."""
        return sum(self.seconds[phase] for phase in USEFUL) / max(self.total(), 1e-9)

    def lose(self, seconds: float) -> None:
        """Adds time of an earlier process whose work was not saved."""
        self.seconds["lost"] += max(0.0, seconds)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, fit for JSON."""
        self.total()
        return dict(self.seconds)

    def load(self, state: Mapping[str, float]) -> None:
        """Goes on from the `state` of an earlier process; time of this one so far is added to it."""
        for phase in PHASES:
            self.seconds[phase] += float(state.get(phase, 0.0))

    def _charge(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self._since
        self._since = now
