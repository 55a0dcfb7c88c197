# SPDX-License-Identifier: Apache-2.0
"""What the next call of the engine does: which rows decode, which chunks of prompts are prefilled, in which pages.

First come, first served, lower priorities first. A request is admitted where a row is free and there are pages for its
prompt and the beginning of its answer. Where pages run out, the request that was admitted last gives up its own and
waits again: it is then answered anew, with the same tokens, because an answer does not depend on what else runs. The
oldest request is never set back, so somebody always gets to its end.

This file knows no arrays: it plans by the numbers of tokens alone, a call ahead of the device.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from qwen2_jax.infer.engine.pages import PAGE, Pages

FIRST_TOKENS = 512  # of an answer that there must be pages for when its request is admitted
FREE_PART = 32  # one part of so many of the pages stays free when a request is admitted beside others


@dataclasses.dataclass(eq=False)
class Answering:
    """A request that is being answered. Its prompt without the last token is prefilled; the rest is fed by its row.

    number: of the request. tokens: the prompt. limit: most tokens of the answer. identity: what its cache depends on
    besides its tokens. filled: tokens whose cache has been asked for. ahead: most tokens that its row can have sampled
    after all calls so far. admissions: how often it was admitted: once more than it was set back.
    """

    number: int
    tokens: Sequence[int]
    limit: int
    identity: bytes = b""
    priority: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    filled: int = 0
    ahead: int = 0
    admissions: int = 0
    _keys: list[bytes] | None = None

    @property
    def fed(self) -> int:
        """Tokens of the prompt that are prefilled."""
        return len(self.tokens) - 1

    @property
    def ready(self) -> bool:
        """Whether its prompt is filled, so that a row can decode it."""
        return self.filled == self.fed

    def keys(self, pages: Pages) -> list[bytes]:
        if self._keys is None:
            self._keys = pages.keys(self.identity, self.tokens[:-1])
        return self._keys

    def slots(self, steps: int) -> int:
        """Slots that its tokens take after `steps` more."""
        return self.fed + min(self.ahead + steps, self.limit)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens start to stop of a prompt."""

    answering: Answering
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One call. rows: in the order of their admission. copies: (page, page that becomes its copy) before it.

    shape: prompts and tokens of the chunks' array. steps: tokens for each row at most. wanted: rows that could be used
    if there were as many."""

    rows: list[Answering]
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    shape: tuple[int, int]
    steps: int
    wanted: int


class Scheduler:
    """Plans calls for at most `rows` requests at a time.

    shapes: (prompts, tokens) of the arrays of chunks, smaller tokens first; tokens of all but the smallest are
    multiples of PAGE, so that a prompt is cut at the same places whatever else runs. share: whether beginnings of
    prompts are found.
    """

    def __init__(self, pages: Pages, rows: int, shapes: Sequence[tuple[int, int]], *, share: bool = True):
        if any(tokens % PAGE and (prompts > 1 or tokens > PAGE) for prompts, tokens in shapes):
            raise ValueError(f"tokens that are no multiple of {PAGE} must be fewer, and of one prompt; got {shapes}")
        self.pages, self.rows, self.shapes, self.share = pages, rows, sorted(shapes, key=lambda s: (s[1], s[0])), share
        self.waiting: list[Answering] = []
        self.running: list[Answering] = []  # in the order of their admission
        self.preemptions = self.found = self.asked = 0  # found, asked: tokens

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def needs(self, answering: Answering) -> int:
        """Pages that a request takes at its end."""
        return _pages(answering.slots(answering.limit))

    def add(self, answering: Answering) -> None:
        """Raises ValueError for a request that all pages together are too few for."""
        if self.needs(answering) > self.pages.usable:
            raise ValueError(f"needs {self.needs(answering)} pages, there are {self.pages.usable}")
        bisect.insort(self.waiting, answering, key=_turn)

    def end(self, answering: Answering, *, forget: bool = False) -> list[int]:
        """Takes out a request that has ended or is given up, in whatever state. forget: its pages cannot be found any
        more. Returns those that are free now."""
        if answering in self.running:
            self.running.remove(answering)
            return self._let_go(answering, forget=forget)
        self.waiting.remove(answering)
        return []

    def plan(self, steps: int) -> StepPlan:
        """The next call, of at most `steps` tokens for each row; it counts as made."""
        copies: list[tuple[int, int]] = []
        chunks, shape = self._chunks(copies)
        steps = 1 if chunks else steps
        ready = [one for one in self.running if one.ready and one.ahead < one.limit]
        rows = self._grown(ready, steps)
        chunks = [chunk for chunk in chunks if chunk.answering in self.running]  # growing may have set some back
        for answering in rows:
            answering.ahead = min(answering.ahead + steps, answering.limit)
        for chunk in chunks:
            chunk.answering.filled = chunk.stop
            self._publish(chunk)
        copies = [(source, target) for source, target in copies if any(target in s.pages for s in self.running)]
        return StepPlan(rows, chunks, copies, shape, steps, len(self.running) + len(self.waiting))

    def _chunks(self, copies: list[tuple[int, int]]) -> tuple[list[Chunk], tuple[int, int]]:
        """The next chunks of prompts, those of running requests first, and the array that they fit."""
        begun = [answering for answering in self.running if not answering.ready]
        while not begun and (admitted := self._admit(copies, begun)) is not None:
            begun += [admitted] * (not admitted.ready)
        if not begun:
            return [], (0, 0)
        sizes = sorted({tokens for _, tokens in self.shapes})
        tokens = chunk_tokens(begun[0].fed - begun[0].filled, sizes)
        most = max(prompts for prompts, size in self.shapes if size == tokens)
        while len(begun) < most and (admitted := self._admit(copies, begun)) is not None:
            begun += [admitted] * (not admitted.ready)
        chunks = [Chunk(s, s.filled, min(s.filled + tokens, s.fed)) for s in begun[:most]]
        prompts = min(prompts for prompts, size in self.shapes if size == tokens and prompts >= len(chunks))
        return chunks, (prompts, tokens)

    def _admit(self, copies: list[tuple[int, int]], begun: Sequence[Answering]) -> Answering | None:
        """Gives the next request its pages, where there are a row and pages for it.

        One whose prompt begins as one that is being prefilled waits until it can take pages from there."""
        if not self.waiting or len(self.running) >= self.rows:
            return None
        answering = self.waiting[0]
        if self.share and any(answering.keys(self.pages)[:1] == other.keys(self.pages)[:1] for other in begun):
            return None
        full = answering.fed // PAGE
        found = self.pages.find(answering.keys(self.pages)[:full]) if self.share else []
        first = _pages(answering.slots(min(answering.limit, FIRST_TOKENS))) - len(found)
        spare = -(-self.pages.usable // FREE_PART) if self.running else 0
        if first + spare > self.pages.available:
            self.pages.release(found)
            return None
        self.waiting.pop(0)
        answering.pages = [*found, *self.pages.take(_pages(answering.slots(1)) - len(found))]
        answering.filled, answering.ahead = len(found) * PAGE, 0
        if self.share and len(found) == full and answering.fed % PAGE:
            like = self.pages.peek(answering.keys(self.pages)[full])
            if like is not None and like not in answering.pages:
                copies.append((like, answering.pages[full]))
                answering.filled = answering.fed
        self.found, self.asked = self.found + answering.filled, self.asked + answering.fed
        answering.admissions += 1
        self.running.append(answering)
        return answering

    def _grown(self, ready: list[Answering], steps: int) -> list[Answering]:
        """The rows of the next call, with pages for `steps` more tokens each, oldest first."""
        rows = []
        for answering in ready:
            if answering not in self.running:
                continue
            lacking = _pages(answering.slots(steps)) - len(answering.pages)
            while lacking > self.pages.available:
                last = self.running[-1]
                self._set_back(last)
                if last is answering:
                    break
            else:
                answering.pages += self.pages.take(max(lacking, 0))
                rows.append(answering)
        return [answering for answering in rows if answering in self.running]

    def _set_back(self, answering: Answering) -> None:
        self.running.remove(answering)
        self._let_go(answering)
        self.preemptions += 1
        bisect.insort(self.waiting, answering, key=_turn)

    def _let_go(self, answering: Answering, *, forget: bool = False) -> list[int]:
        full = answering.fed // PAGE
        if answering.fed % PAGE and full < len(answering.pages):
            self.pages.withdraw(answering.pages[full])  # its holder has written on
        free = self.pages.release(answering.pages, forget=forget)
        answering.pages, answering.filled = [], 0
        return free

    def _publish(self, chunk: Chunk) -> None:
        answering = chunk.answering
        if not self.share:
            return
        keys = answering.keys(self.pages)
        for n in range(chunk.start // PAGE, -(-chunk.stop // PAGE)):
            if chunk.stop >= min((n + 1) * PAGE, answering.fed):
                self.pages.publish(answering.pages[n], keys[n])


def chunk_tokens(left: int, sizes: Sequence[int]) -> int:
    """The size of the next chunk of a prompt of which `left` tokens are left.

    The largest first; at most a third of the last chunk is padding, where there are sizes for that. Prompts are cut at
    multiples of PAGE only, so that what is found of a prompt changes nothing in how the rest is computed.
    """
    size = next((size for size in sizes if size >= left), sizes[-1])
    smaller = [other for other in sizes if other < size and other % PAGE == 0]
    return smaller[-1] if smaller and left <= 3 * smaller[-1] and left <= 0.75 * size else size


def _turn(answering: Answering) -> tuple[int, int]:
    return answering.priority, answering.number


def _pages(slots: int) -> int:
    return max(1, -(-slots // PAGE))
