# SPDX-License-Identifier: Apache-2.0
"""A device without a model, for tests of the engine: each slot of a cache holds a number in place of keys and values.

The number depends on the weights, on what the request's cache depends on, and on all tokens up to the slot's. Whenever
a call reads a request's pages, all of them must be there: a page that was given away, taken too early, half filled or
filled for somebody else is found out at once. The next token is a hash of the same number, the seed and the count.
"""

import dataclasses
from typing import Any

import numpy as np

from qwen2_jax.infer.engine.pages import PAGE, RESERVED
from qwen2_jax.infer.engine.requests import CheckedRequest, Request
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.engine.scheduler import StepPlan
from qwen2_jax.infer.engine.step import STEPS, Made
from qwen2_jax.infer.engine.step_programs import StepShapes

VOCABULARY, EOS = 300, 1
LONGEST = 1 << 13  # tokens of prompt and answer
NOT_A_NUMBER = np.uint64(1)  # in a page: it spoils all that is read beside it
MASK = (1 << 64) - 1
FACTORS = np.random.default_rng(0).integers(1 << 40, 1 << 63, LONGEST, np.uint64) | np.uint64(1)


def mixed(*numbers: int) -> int:
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ number) * 0xBF58476D1CE4E5B9) & MASK
        value ^= value >> 29
    return value


@dataclasses.dataclass(eq=False)
class Asked:
    """A request as the tests know it. meaning: of its cache, besides the tokens. breaks: after so many tokens of the
    answer, its numbers are not finite; -1: never. stale: weights changed while it was being answered."""

    request: CheckedRequest
    meaning: int
    breaks: int = -1
    priority: int = 0
    stale: bool = False
    heard: list[int] = dataclasses.field(default_factory=list)
    reason: str = ""
    _known: Any = None

    @classmethod
    def of(cls, tokens, limit: int, seed: int, meaning: int, **rest: Any) -> "Asked":
        params = SamplingParams(max_new_tokens=limit, seed=seed, eos_ids=(EOS,))
        return cls(CheckedRequest(Request(tuple(tokens), params)), meaning, **rest)

    def slots(self, weights: int) -> np.ndarray:
        """What the slots of prompt and answer hold, all of it computed alone."""
        return self._answered(weights)[0]

    def answer(self, weights: int) -> tuple[list[int], str]:
        """(tokens, finish_reason) of this request alone."""
        return self._answered(weights)[1:]

    def _answered(self, weights: int):
        if self._known is None or self._known[0] != weights:
            self._known = weights, *self._alone(weights)
        return self._known[1:]

    def _alone(self, weights: int) -> tuple[np.ndarray, list[int], str]:
        prompt, params = np.array(self.request.tokens, np.uint64), self.request.sampling_params
        beginning = mixed(weights, self.meaning)
        with np.errstate(over="ignore"):
            sums = np.cumsum((prompt + np.uint64(1)) * FACTORS[: len(prompt)]) + np.uint64(beginning)
        slots, answer = sums.tolist(), []
        while True:
            if len(answer) == self.breaks:
                return np.array([*slots[:-1], NOT_A_NUMBER], np.uint64), answer, "not_finite"
            token = next_token(slots[-1], params.seed, len(answer))
            answer.append(token)
            if token == EOS or len(answer) == params.max_new_tokens:
                return np.array(slots, np.uint64), answer, "stop" if token == EOS else "length"
            slots.append((slots[-1] + (token + 1) * int(FACTORS[len(slots)])) & MASK)


def next_token(slot: int, seed: int, count: int) -> int:
    return mixed(slot, seed, count) % VOCABULARY


@dataclasses.dataclass
class DeviceRow:
    asked: Asked
    position: int
    count: int
    done: bool


@dataclasses.dataclass
class FakeState:
    """slots: [pages, PAGE]. rows: of the last call."""

    slots: np.ndarray
    rows: list[DeviceRow]


class FakePrograms:
    """In place of StepPrograms. params, the engine's, is the number of the weights."""

    def __init__(self, shapes: StepShapes):
        self.shapes = shapes
        self.asked: dict[int, Asked] = {}  # by the identity of the request: equal requests are two
        self.calls: list[StepPlan] = []
        self.state = FakeState(np.zeros((0, PAGE), np.uint64), [])

    def new_state(self, pages: int) -> FakeState:
        self.state = FakeState(np.full((pages, PAGE), 2, np.uint64), [])
        self.state.slots[1] = 0
        return self.state

    def rotary(self, request, long_context):
        return long_context, long_context.encode()

    def copy(self, state: FakeState, copies) -> FakeState:
        assert state is self.state, "an array that was donated"
        slots = state.slots.copy()
        for source, target in copies:
            assert target >= RESERVED
            slots[target] = state.slots[source]
        self.state = FakeState(slots, state.rows)
        return self.state

    def advance(self, params: int, state: FakeState, plan: StepPlan, source, requests, prompts):
        assert state is self.state, "an array that was donated"
        assert plan.rows or plan.chunks, "a call that does nothing"
        assert len(plan.rows) <= self.shapes.rows[-1] and 1 <= plan.steps <= STEPS
        assert all(len(one.pages) <= self.shapes.pages[-1] for one in plan.rows)
        assert len(plan.rows) == len(source) == len(requests) and len(plan.chunks) == len(prompts)
        if plan.chunks:
            assert plan.steps == 1 and plan.shape in self.shapes.chunks and len(plan.chunks) <= plan.shape[0]
        fed = [one.number for one in plan.rows] + [chunk.answering.number for chunk in plan.chunks]
        assert len(fed) == len(set(fed)), "a request twice in a call"
        self.calls.append(plan)
        slots = state.slots
        B = next(n for n in self.shapes.rows if n >= len(plan.rows))
        tokens, logprobs = np.full((STEPS, B), -1, np.int32), np.zeros((STEPS, B), np.float32)
        rows = [self._row(state, at, request) for at, (request, _) in zip(source, requests, strict=True)]
        for chunk, (request, _) in zip(plan.chunks, prompts, strict=True):
            self._fill(params, slots, chunk, plan.shape[1], self.asked[id(request)])
        for row, one in zip(rows, plan.rows, strict=True):
            check_filled(slots, one.pages, row.asked, params, row.position)
        for step in range(plan.steps):
            for n, (row, one) in enumerate(zip(rows, plan.rows, strict=True)):
                if not row.done:
                    tokens[step, n] = self._decode(params, slots, row, one.pages)
        for row, one in zip(rows, plan.rows, strict=True):  # nobody else has written there
            check_filled(slots, one.pages, row.asked, params, row.position)
        self.state = FakeState(slots, rows)
        return self.state, Made(tokens, logprobs, np.array([row.done for row in rows] + [True] * (B - len(rows))))

    def _row(self, state: FakeState, source: int, request) -> DeviceRow:
        asked = self.asked[id(request)]
        if source < 0:
            return DeviceRow(asked, len(request.tokens) - 1, 0, False)
        row = state.rows[source]
        assert row.asked is asked, "continues the row of another request"
        assert row.count < request.sampling_params.max_new_tokens, "a row that the host knows to be at its end"
        return dataclasses.replace(row)

    def _fill(self, weights: int, slots: np.ndarray, chunk, most: int, asked: Asked) -> None:
        start, stop, pages = chunk.start, chunk.stop, chunk.answering.pages
        last = len(asked.request.tokens) - 1
        assert 0 < stop - start <= most and start % PAGE == 0 and (stop % PAGE == 0 or stop == last), (start, stop)
        check_filled(slots, pages, asked, weights, start)
        at = np.arange(start, stop)
        slots[np.array(pages)[at // PAGE], at % PAGE] = asked.slots(weights)[start:stop]

    def _decode(self, weights: int, slots: np.ndarray, row: DeviceRow, pages: list[int]) -> int:
        """The row's next token; -1 where its numbers are not finite."""
        at, asked = row.position, row.asked
        if asked.stale:  # of a mixture of weights: any number will do that no other has
            slots[pages[at // PAGE], at % PAGE] = mixed(weights, id(asked), at)
            answer, reason = asked.answer(weights)
            token = (*answer, EOS)[min(row.count, len(answer))]
        else:
            slots[pages[at // PAGE], at % PAGE] = asked.slots(weights)[at]
            answer, reason = asked.answer(weights)
            token = answer[row.count] if row.count < len(answer) else -1
        row.position, row.count = at + 1, row.count + 1
        row.done = row.count >= len(answer) + (reason == "not_finite")
        return token


def check_filled(slots: np.ndarray, pages: list[int], asked: Asked, weights: int, stop: int) -> None:
    """That the pages hold exactly the first `stop` tokens of this request, and nothing in them spoils the rest."""
    assert min(pages) >= RESERVED and len(set(pages)) == len(pages)
    if asked.stale:
        return
    there, expected = slots[pages].reshape(-1), asked.slots(weights)[:stop]
    assert len(there) >= stop, f"{len(pages)} pages for {stop} tokens"
    right = there[:stop] == expected
    assert right.all(), f"slot {right.argmin()} of {stop} holds something else"
    assert asked.breaks >= 0 or not (there == NOT_A_NUMBER).any(), "numbers that are not finite were left in a page"
