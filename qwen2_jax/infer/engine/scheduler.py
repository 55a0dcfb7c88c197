# SPDX-License-Identifier: Apache-2.0
"""What the next call of the engine does: which rows decode, which chunks of prompts are prefilled, in which pages.

First come, first served, lower priorities first. A request is admitted where a row is free and there are pages for its
prompt and the beginning of its answer. Where pages run out, the running request that is last in turn is preempted: it
gives up its pages and waits again, and is then answered anew, with the same tokens, because an answer does not depend
on what else runs. The first in turn is never preempted, so somebody always gets to its end.

This file knows no arrays: it plans by the numbers of tokens alone, a call ahead of the device.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from qwen2_jax.infer.engine.pages import PAGE, ZEROS, Pages

FIRST_TOKENS = 512  # of an answer that there must be pages for when its request is admitted
FREE_PART = 32  # one part of so many of the pages stays free when a request is admitted beside others


@dataclasses.dataclass(eq=False)
class Answering:
    """A request that is being answered. Its prompt without the last token is prefilled; the rest is fed by its row.

    number: of the request. tokens: the prompt. limit: most tokens of the answer. identity: what its cache depends on
    besides its tokens. pages: of its tokens in their order; none while it waits. filled: tokens whose cache has been
    asked for. ahead: most tokens that its row can have sampled after all calls so far. reached: the same when it was
    preempted. admissions: how often it was admitted: once more than it was preempted, while it runs.
    """

    number: int
    tokens: Sequence[int]
    limit: int
    identity: bytes = b""
    priority: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    filled: int = 0
    ahead: int = 0
    reached: int = 0
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
        """What its pages are known by, of the prefilled tokens only."""
        if self._keys is None:
            self._keys = pages.keys(self.identity, self.tokens[:-1])
        return self._keys

    def pages_for(self, tokens: int) -> int:
        """Pages that it has when its row has sampled so many tokens, or `limit`."""
        return max(1, -(-(self.fed + min(tokens, self.limit)) // PAGE))

    @property
    def promised(self) -> int:
        """Pages that there must be for it when it is admitted; once preempted, it comes back to get further."""
        return self.pages_for(self.reached + FIRST_TOKENS)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens start to stop of a prompt."""

    answering: Answering
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One call. rows: in turn. copies: (page, page that becomes its copy) before it, no page twice the latter.

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

    shapes: (prompts, tokens) of the arrays of chunks; tokens that are no multiple of PAGE are fewer and of one prompt,
    so that a prompt is cut at multiples of PAGE only. share: whether beginnings of prompts are found.
    """

    def __init__(self, pages: Pages, rows: int, shapes: Sequence[tuple[int, int]], *, share: bool = True):
        sizes = sorted({tokens for _, tokens in shapes})
        if sizes[-1] % PAGE or any(tokens % PAGE and (prompts > 1 or tokens > PAGE) for prompts, tokens in shapes):
            raise ValueError(
                f"chunks of {shapes}: beside one of a multiple of {PAGE} tokens, only smaller ones of one prompt"
            )
        self.pages, self.rows, self.shapes, self.sizes, self.share = pages, rows, shapes, sizes, share
        self.waiting: list[Answering] = []  # both in turn
        self.running: list[Answering] = []
        self.preemptions = 0
        self.found = self.asked = 0  # tokens of prompts: those that were there already, and all that were looked for
        self._shortest_first = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, answering: Answering) -> None:
        """Raises ValueError for a request that all pages together are too few for."""
        needed = answering.pages_for(answering.limit)
        if needed > self.pages.usable:
            raise ValueError(
                f"{len(answering.tokens)} tokens and {answering.limit} of an answer need {needed} pages of {PAGE}, and "
                f"there are {self.pages.usable}: ask for fewer tokens or make the cache larger"
            )
        bisect.insort(self.waiting, answering, key=_turn)

    def end(self, answering: Answering) -> None:
        """Takes out a request that has ended or is given up, in whatever state."""
        if answering.pages:
            self._let_go(answering)
        else:
            self.waiting.remove(answering)

    def forget(self) -> None:
        """Nothing computed so far is found any more: for new weights."""
        self.pages.clear()
        for answering in self.waiting:
            answering._keys = None

    def plan(self, steps: int) -> StepPlan:
        """The next call, of at most `steps` tokens for each row; it counts as made. Empty only where everybody waits
        for results of earlier calls."""
        copied: list[tuple[int, Answering]] = []  # a page that the last page of the prompt becomes a copy of
        taken: list[int] = []
        while self._admit(copied, taken):
            pass
        steps = steps if all(answering.ready for answering in self.running) else 1
        rows = self._rows(steps, taken)
        chunks, shape = self._chunks()
        copies = [(page, one.pages[one.fed // PAGE]) for page, one in copied if one.pages]
        # What is in a page may not be finite, and in attention a weight of 0 does not hide it.
        copies += [(ZEROS, page) for page in sorted({*taken} - {page for _, page in copies})]
        return StepPlan(rows, chunks, copies, shape, steps, len(self.running) + len(self.waiting))

    def _admit(self, copied: list[tuple[int, Answering]], taken: list[int]) -> bool:
        """Gives the next request its pages, where there are a row and pages for it; returns whether it did."""
        if not self.waiting or len(self.running) >= self.rows:
            return False
        answering = self.waiting[0]
        full = answering.fed // PAGE
        keys = answering.keys(self.pages) if self.share else []
        found = self.pages.find(keys[:full])
        if self._is_filled(keys, len(found)) or answering.promised - len(found) + self._spare() > self.pages.available:
            self.pages.release(found)
            return False
        self.waiting.pop(0)
        bisect.insort(self.running, answering, key=_turn)
        new = self.pages.take(answering.pages_for(1) - len(found))
        taken += new
        answering.pages, answering.filled, answering.ahead = found + new, len(found) * PAGE, 0
        if len(found) == full < len(keys) and (like := self.pages.peek(keys[full])) is not None:
            copied.append((like, answering))
            answering.filled = answering.fed
        if not answering.admissions:
            self.found, self.asked = self.found + answering.filled, self.asked + answering.fed
        answering.admissions += 1
        return True

    def _is_filled(self, keys: Sequence[bytes], number: int) -> bool:
        """Whether page `number` is being filled for another, so that it is found if one waits."""
        some = keys[number : number + 1]
        return bool(some) and any(
            not other.ready and other.keys(self.pages)[number : number + 1] == some for other in self.running
        )

    def _spare(self) -> int:
        """Pages that stay free when a request is admitted: some, and those that were promised to others."""
        if not self.running:
            return 0
        return -(-self.pages.usable // FREE_PART) + sum(max(0, one.promised - len(one.pages)) for one in self.running)

    def _rows(self, steps: int, taken: list[int]) -> list[Answering]:
        """The rows of the next call, with pages for `steps` more tokens each."""
        rows = []
        for answering in list(self.running):
            if not answering.pages or not answering.ready or answering.ahead == answering.limit:
                continue
            lacking = answering.pages_for(answering.ahead + steps) - len(answering.pages)
            while answering.pages and lacking > self.pages.available:
                self._preempt(self.running[-1])
            if answering.pages:
                self._withdraw_last(answering)
                new = self.pages.take(lacking)
                taken += new
                answering.pages += new
                answering.ahead = min(answering.ahead + steps, answering.limit)
                rows.append(answering)
        return rows

    def _chunks(self) -> tuple[list[Chunk], tuple[int, int]]:
        """The next chunks of prompts, and the array that they fit.

        Every other time the shortest come first, so that nobody waits for the whole of a long prompt.
        """
        begun = [answering for answering in self.running if not answering.ready]
        if not begun:
            return [], (0, 0)
        if self._shortest_first:
            begun.sort(key=lambda answering: (answering.priority, answering.fed - answering.filled))
        self._shortest_first = not self._shortest_first
        tokens = chunk_tokens(begun[0].fed - begun[0].filled, self.sizes)
        prompts = sorted(prompts for prompts, size in self.shapes if size == tokens)
        chunks = []
        for answering in begun[: prompts[-1]]:
            chunk = Chunk(answering, answering.filled, min(answering.filled + tokens, answering.fed))
            answering.filled = chunk.stop
            self._publish(chunk)
            chunks.append(chunk)
        return chunks, (next(number for number in prompts if number >= len(chunks)), tokens)

    def _preempt(self, answering: Answering) -> None:
        answering.reached = max(answering.reached, answering.ahead)
        self._let_go(answering)
        self.preemptions += 1
        bisect.insort(self.waiting, answering, key=_turn)

    def _let_go(self, answering: Answering) -> None:
        self.running.remove(answering)
        self._withdraw_last(answering)
        self.pages.release(answering.pages)
        answering.pages, answering.filled, answering._keys = [], 0, None

    def _withdraw_last(self, answering: Answering) -> None:
        """The last page of its prompt is not full, and not found once its row writes on."""
        if answering.fed % PAGE:
            self.pages.withdraw(answering.pages[answering.fed // PAGE])

    def _publish(self, chunk: Chunk) -> None:
        """Lets others find what the chunk fills: full pages, and the last of the prompt, which is copied."""
        if self.share:
            keys = chunk.answering.keys(self.pages)
            for n in range(chunk.start // PAGE, -(-chunk.stop // PAGE)):
                self.pages.publish(chunk.answering.pages[n], keys[n])


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
