# SPDX-License-Identifier: Apache-2.0
"""Time accounting of a run by phase."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qwen2_jax import validate

# Waiting for data, sampling completions, training, saving, evaluating, compiling, repeating steps lost in a crash, and
# everything else.
PHASES = ("data", "rollout", "step", "save", "evaluation", "compile", "lost", "other")
USEFUL = ("rollout", "step")

_compiled = 0


def _count(event: str, duration_secs: float, **_: Any) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def programs_compiled() -> int:
    """Number of programs this process has compiled or loaded from the cache; growth in steady state is a bug."""
    return _compiled


class Goodput:
    """A clock that is always in exactly one phase: the phases add up to the elapsed time.

        with goodput("data", behind=loss): batch = next(batches)
        with goodput("step"): state, metrics = step(state, batch)

    Time of a nested phase is not counted for the outer one. A phase in which jax compiled counts as "compile".
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now, self._phase, self._since = now, "other", now()

    @contextlib.contextmanager
    def __call__(self, phase: str, behind: Any = None) -> Iterator[None]:
        """Counts the time inside the block as `phase`, one of PHASES.

        behind: a jax array that the devices were computing at the start. If it is still not ready at the end, the block
        was hidden behind the computation and counts as "step". An exposed wait counts in full, although the devices may
        have been busy at its start: the share of "data" is an upper bound.
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
        """The goodput: share of the time spent on training, or on sampling its data."""
        return sum(self.seconds[phase] for phase in USEFUL) / max(self.total(), 1e-9)

    def lose(self, seconds: float) -> None:
        """Adds time of an earlier process whose steps were not saved."""
        self.seconds["lost"] += max(0.0, seconds)

    def state(self) -> dict[str, float]:
        """The state for a checkpoint, JSON-serializable."""
        self.total()
        return dict(self.seconds)

    def load(self, state: Mapping[str, float]) -> None:
        """Resumes from the `state` of an earlier process; adds this process's time so far."""
        for phase in PHASES:
            self.seconds[phase] += float(state.get(phase, 0.0))

    def _charge(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self._since
        self._since = now
