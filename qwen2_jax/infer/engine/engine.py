# SPDX-License-Identifier: Apache-2.0
"""The engine: answers requests over token ids, many at a time, as they come and go (continuous batching).

    engine.add(request)     at any time
    engine.step()           one call of the compiled step; returns what the call before it made
    engine.abort(number)    at any time

The device runs one call while the host plans the next. A call depends on nothing that the host learns from the one
before: sampled tokens, ends at an end-of-sequence id and limits stay on the device. So the host is a call behind, and a
row that has ended, or is given up, may be in one more call, which makes nothing of it or is not read.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax

from qwen2_jax.infer.engine.pages import Pages
from qwen2_jax.infer.engine.requests import CheckedRequest
from qwen2_jax.infer.engine.sampling_params import finish_reason
from qwen2_jax.infer.engine.scheduler import Answering, Scheduler, StepPlan
from qwen2_jax.infer.engine.step import STEPS, Made
from qwen2_jax.infer.engine.step_programs import StepPrograms
from qwen2_jax.model import rope
from qwen2_jax.weights.params import Tree


class Event(NamedTuple):
    """New tokens of a request, and its end. finish_reason: "" while it goes on, else as in Generation."""

    number: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclasses.dataclass(eq=False)
class _Open:
    """A request that has not ended. heard: tokens of its answer that were returned. made: those that were made since
    it was admitted for the `admission`-th time; after a preemption they are made anew, and returned from `heard` on."""

    request: CheckedRequest
    rotary: rope.Row
    answering: Answering
    heard: int = 0
    admission: int = 0
    made: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Answers requests with the given parameters. `programs` are shared by engines and outlive them."""

    def __init__(self, programs: StepPrograms, params: Tree, pages: int, *, share: bool = True):
        """pages: of the cache. share: whether prompts with the same beginning share pages."""
        self.programs, self.params = programs, params
        self.pages = Pages(pages)
        self.scheduler = Scheduler(self.pages, programs.shapes.rows[-1], programs.shapes.chunks, share=share)
        self._state = programs.new_state(pages)
        self._open: dict[int, _Open] = {}
        self._called: list[tuple[list[tuple[Answering, int]], Made]] = []  # not read yet: rows with their admissions
        self._row_of: dict[Answering, int] = {}  # in the last call; who is preempted misses one
        self._number = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open

    def add(
        self,
        request: CheckedRequest,
        long_context: rope.LongContext = "auto",
        *,
        salt: bytes = b"",
        priority: int = 0,
    ) -> int:
        """Takes a request; returns its number. Raises ValueError for one that all pages together are too few for.

        salt: only requests with the same salt share pages. priority: lower ones come first.
        """
        rotary, identity = self.programs.rotary(request, long_context)
        limit = request.sampling_params.max_new_tokens
        answering = Answering(self._number, request.tokens, limit, identity + salt, priority)
        self.scheduler.add(answering)
        self._open[self._number] = _Open(request, rotary, answering)
        self._number += 1
        return answering.number

    def abort(self, number: int) -> None:
        """Gives a request up, in whatever state; no more is heard of it. Nothing happens where it has ended."""
        if (one := self._open.pop(number, None)) is not None:
            self.scheduler.end(one.answering)

    def new_weights(self, params: Tree) -> None:
        """Goes on with other parameters. Requests that are being answered keep their cache; others find none of it."""
        self.params = params
        self.scheduler.forget()

    def step(self, steps: int = STEPS) -> list[Event]:
        """Makes one call and returns what the call before it made. steps: most tokens of a row in this call."""
        plan = self.scheduler.plan(min(steps, STEPS))
        calls = bool(plan.rows or plan.chunks)
        if calls:
            self._call(plan)
        events = []
        while len(self._called) > calls:  # all but the call just made
            events += self._read()
        return events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do."""
        while not self.idle:
            yield from self.step()

    def _call(self, plan: StepPlan) -> None:
        def asked(answering: Answering):
            one = self._open[answering.number]
            return one.request, one.rotary

        if plan.copies:
            self._state = self.programs.copy(self._state, plan.copies)
        self._state, made = self.programs.advance(
            self.params,
            self._state,
            plan,
            source=[self._row_of.get(answering, -1) for answering in plan.rows],
            requests=[asked(answering) for answering in plan.rows],
            prompts=[asked(chunk.answering) for chunk in plan.chunks],
        )
        self._row_of = {answering: n for n, answering in enumerate(plan.rows)}
        self._called.append(([(answering, answering.admissions) for answering in plan.rows], made))

    def _read(self) -> list[Event]:
        """The events of the oldest call that was not read."""
        rows, made = self._called[0]
        made = jax.device_get(made)  # it may wait long, and be interrupted: then it is read the next time
        del self._called[0]
        events = []
        for n, (answering, admission) in enumerate(rows):
            one = self._open.get(answering.number)
            if one is None or admission != answering.admissions:  # ended or given up; or answered anew by now
                continue
            if one.admission != admission:
                one.admission, one.made = admission, []
            some, known = made.tokens[:, n] >= 0, len(one.made)
            one.made += made.tokens[some, n].tolist()
            new = max(one.heard - known, 0)  # what comes before was returned by an earlier admission
            tokens, logprobs = one.made[known + new :], made.logprobs[some, n][new:].tolist()
            one.heard += len(tokens)
            reason = finish_reason(one.request.sampling_params, one.made) if made.done_B[n] else ""
            if reason:
                del self._open[answering.number]
                self.scheduler.end(answering)
            if tokens or reason:
                events.append(Event(answering.number, tokens, logprobs, reason))
        return events
