# SPDX-License-Identifier: Apache-2.0
"""The engine's plans and pages under random traffic (N / 4 histories for --mutations N), on a device that checks them.

Whatever else runs, however few pages there are and whoever is preempted or given up: each answer is that of the request
alone, nobody waits for ever, and in the end all pages are free.
"""

import collections
import contextlib
import functools
import random
from unittest import mock

import pytest

from fake_device import NOT_A_NUMBER, Asked, FakePrograms
from qwen2_jax.infer.engine.engine import Engine
from qwen2_jax.infer.engine.pages import PAGE, RESERVED, Pages
from qwen2_jax.infer.engine.scheduler import FIRST_TOKENS, Answering, Scheduler, chunk_tokens
from qwen2_jax.infer.engine.step_programs import StepShapes

CHUNKS = (((1, 32), (1, 128), (1, 512)), ((1, 128), (4, 128), (2, 512)), ((1, 128),), ((1, 32), (2, 256)))


class Traffic:
    """An engine, what was asked of it, and what must hold after every event."""

    def __init__(
        self, draw: random.Random, *, pages: int | None = None, rows: int | None = None, share=None, chunks=None
    ):
        self.draw = draw
        shapes = StepShapes((2, rows or draw.choice((2, 3, 8))), chunks or draw.choice(CHUNKS), (4, 64))
        share = draw.random() < 0.8 if share is None else share
        self.programs = FakePrograms(shapes)
        self.engine = Engine(self.programs, 0, RESERVED + (pages or draw.choice((4, 5, 6, 8, 12, 40))), share=share)
        self.asked: dict[int, Asked] = {}  # open requests by number
        self.ended: list[Asked] = []
        self.parents: dict[bytes, bytes] = {}
        self.check()

    def add(self, asked: Asked, *, salt: bytes = b"", long_context="auto") -> int | None:
        """Its number, or None where the engine refuses it because it needs more pages than there are."""
        slots = len(asked.request.tokens) - 1 + asked.request.sampling_params.max_new_tokens
        add = functools.partial(self.engine.add, asked.request, long_context, salt=salt, priority=asked.priority)
        if -(-slots // PAGE) > self.engine.pages.usable:
            with pytest.raises(ValueError, match=f"need {-(-slots // PAGE)} pages of 128, and there are"):
                add()
            self.check()
            return None
        number = add()
        self.programs.asked[id(asked.request)] = self.asked[number] = asked
        keys = self.keys(number)
        self.parents |= zip(keys[1:], keys, strict=False)
        self.check()
        return number

    def keys(self, number: int) -> list[bytes]:
        answering = self.engine._open[number].answering
        return self.engine.pages.keys(answering.identity, answering.tokens[:-1])

    def abort(self, number: int) -> None:
        self.engine.abort(number)
        self.asked.pop(number, None)
        self.check()

    def interrupt(self) -> None:
        """Control-C while results are waited for: the call was made, and nothing is lost."""
        with mock.patch("jax.device_get", side_effect=KeyboardInterrupt), contextlib.suppress(KeyboardInterrupt):
            assert self.engine.step() == []
        self.check()

    def step(self, steps: int = 16) -> None:
        scheduler, calls = self.engine.scheduler, len(self.programs.calls)
        pending, first = bool(self.engine._called), scheduler.running[:1]
        busy = bool(self.asked)
        for event in self.engine.step(steps):
            asked = self.asked[event.number]
            assert not asked.reason, "heard of after its end"
            assert len(event.tokens) == len(event.logprobs) and (event.tokens or event.finish_reason)
            asked.heard += event.tokens
            if event.finish_reason:
                asked.reason = event.finish_reason
                del self.asked[event.number]
                self.ended.append(asked)
                if not asked.stale:
                    assert (asked.heard, asked.reason) == asked.answer(self.engine.params)
            elif not asked.stale:
                assert asked.heard == asked.answer(self.engine.params)[0][: len(asked.heard)]
        assert not busy or len(self.programs.calls) > calls or pending, "nothing was done, nothing was read"
        assert len(self.engine._called) <= 1, "more than one call ahead"
        if (
            first
            and first[0].number in self.asked
            and not any((one.priority, one.number) < (first[0].priority, first[0].number) for one in scheduler.running)
        ):
            assert first[0] in scheduler.running, "the first in turn was preempted"
        self.check()

    def finish(self) -> None:
        """Answers what is open; then everything is free."""
        bound = 60 + 40 * sum(
            len(one.request.tokens) // 32 + one.request.sampling_params.max_new_tokens for one in self.asked.values()
        )
        while self.asked:
            self.step(self.draw.choice((1, 3, 16)))
            bound -= 1
            assert bound, "somebody waits for ever"
        assert self.engine.idle and self.engine.scheduler.idle
        assert self.engine.pages.available == self.engine.pages.usable
        assert not any(self.engine.pages._holders)

    def new_weights(self) -> None:
        for number, asked in self.asked.items():
            asked.stale |= self.engine._open[number].answering.admissions > 0
        self.engine.new_weights(self.engine.params + 1)
        self.parents = {}
        for number in self.asked:
            keys = self.keys(number)
            self.parents |= zip(keys[1:], keys, strict=False)
        self.check()

    def check(self) -> None:
        pages, scheduler = self.engine.pages, self.engine.scheduler
        # Each page is free, held or kept, and held by as many as have it in their tables; the reserved ones are not.
        held = collections.Counter(page for one in scheduler.running for page in one.pages)
        assert {page: n for page, n in enumerate(pages._holders) if n} == held
        assert sorted([*pages._free, *pages._kept, *held]) == list(range(RESERVED, pages.count))
        assert not any(one.pages for one in scheduler.waiting)
        # Only full pages of prompts are shared, at the same place of the same beginning; the others have one owner.
        for one in scheduler.running:
            own = one.pages[one.fed // PAGE if scheduler.share else 0 :]
            assert all(held[page] == 1 for page in own), "a page that is written is shared"
        assert scheduler.share or not pages._page_of
        # No page is given away before those that begin with it.
        order = {page: n for n, page in enumerate(pages._kept)}
        for page, n in order.items():
            parent = self.parents.get(pages._key_of[page])
            if parent in pages._page_of:
                assert order.get(pages._page_of[parent], len(order)) > n
        # First come, first served within a priority.
        for priority in {one.priority for one in scheduler.waiting}:
            oldest = min(one.number for one in scheduler.waiting if one.priority == priority)
            assert all(one.number < oldest for one in scheduler.running if one.priority == priority)
        assert len(scheduler.running) <= self.programs.shapes.rows[-1]
        assert (
            {one.number for one in scheduler.running + scheduler.waiting}
            == self.asked.keys()
            == self.engine._open.keys()
        )
        # Anything may be in a free page.
        self.programs.state.slots[pages._free] = NOT_A_NUMBER


def random_asked(draw: random.Random, seen: list[Asked], crowded: bool) -> tuple[Asked, dict]:
    """A request, in half of the cases one that begins as another, and the keywords of Engine.add.

    crowded: those that fit one page when they are admitted and need another soon.
    """
    length = PAGE * draw.randint(0, 3) + draw.choice((-1, 0, 1, 2, 3, 30, 33, 100))
    length = draw.randint(60, PAGE) if crowded else max(1, length)
    if draw.random() < 0.05:
        length = draw.randint(1, 700)
    like = draw.choice(seen).request.tokens if seen and draw.random() < 0.6 else ()
    if draw.random() < 0.5:
        like = like[: draw.choice((100, PAGE, PAGE + 1, 2 * PAGE))]
    tokens = like if like and draw.random() < 0.5 else (*like, *draw.choices(range(40), k=length))[:length]
    salt, long_context = draw.choice((b"", b"", b"", b"a")), draw.choice(("auto", "auto", "off"))
    asked = Asked.of(
        tokens,
        limit=draw.choice((100, 200) if crowded else (1, 2, 5, 17, 40, 40, 200)),
        seed=draw.randrange(4),
        meaning=len(salt) + 2 * len(long_context),  # more than the cache depends on: a hit across salts is found out
        breaks=draw.randrange(4) if draw.random() < 0.04 else -1,
        priority=draw.choice((0, 0, 0, 0, 1)),
    )
    return asked, {"salt": salt, "long_context": long_context}


def test_random_traffic(mutations):
    """A history takes as long as four of the mutations of other tests."""
    for seed in mutations[: -(-len(mutations) // 4)]:
        draw = random.Random(seed)
        # Where less is promised to those that are admitted, they are preempted sooner.
        promised = draw.choice((FIRST_TOKENS, 1, 1, 60))
        try:
            with mock.patch("qwen2_jax.infer.engine.scheduler.FIRST_TOKENS", promised):
                random_traffic(draw)
        except Exception as error:
            raise AssertionError(f"history {seed}: {type(error).__name__}: {error}") from error


def random_traffic(draw: random.Random) -> None:
    crowded = draw.random() < 0.4
    traffic, seen = Traffic(draw, **{"pages": draw.randint(4, 9), "rows": 8} if crowded else {}), []
    busy, aborting = draw.random(), draw.choice((0, 0.02, 0.1))
    for _ in range(draw.randint(1, 12)):
        for _ in range(draw.choice((0, 1, 1, 2, 6)) if draw.random() < busy else 0):
            asked, how = random_asked(draw, seen, crowded)
            seen.append(asked)
            traffic.add(asked, **how)
        traffic.step(draw.choice((1, 2, 16)))
        for number in list(traffic.asked):
            if draw.random() < aborting:
                traffic.abort(number)
        if draw.random() < 0.01:
            traffic.new_weights()
        if draw.random() < 0.02:
            traffic.interrupt()
    traffic.finish()


def chunks_until_answered(traffic: Traffic, number: int) -> int:
    """Calls with chunks of prompts, from now until the one before that with the request's row."""
    calls = len(traffic.programs.calls)
    while not traffic.programs.calls or all(one.number != number for one in traffic.programs.calls[-1].rows):
        traffic.step(1)
    return sum(bool(plan.chunks) for plan in traffic.programs.calls[calls:-1])


def quiet(**how) -> Traffic:
    """An engine with many pages, that shares and has one size of chunk, unless told otherwise."""
    return Traffic(random.Random(0), **{"pages": 200, "rows": 8, "share": True, "chunks": ((1, 128),), **how})


def asked_for(length: int, *, limit: int = 8, seed: int = 0, first: int = 3, priority: int = 0) -> Asked:
    """A request whose tokens are a function of length and `first`, which is also the first."""
    tokens = [(first + n * n) % 40 for n in range(length)]
    return Asked.of(tokens, limit, seed, 8, priority=priority)


def test_a_long_prompt_does_not_hold_up_short_ones():
    """A short one comes with every other call; the long one, and equal ones, in the order of their arrival."""
    traffic = quiet()
    long = traffic.add(asked_for(40 * PAGE))
    traffic.step()
    short = [traffic.add(asked_for(100, first=n)) for n in range(3)]
    assert [chunks_until_answered(traffic, number) for number in short] == [1, 1, 1]
    assert chunks_until_answered(traffic, long) == 40 - 4
    first, second = (traffic.add(asked_for(10 * PAGE, first=n)) for n in (5, 6))
    assert chunks_until_answered(traffic, first) == 10
    assert chunks_until_answered(traffic, second) == 9  # and one beside the row of the first
    traffic.finish()


def test_short_prompts_do_not_overtake_urgent_ones():
    traffic = quiet()
    traffic.add(asked_for(9, first=1, priority=1))
    number = traffic.add(asked_for(10 * PAGE, first=2))
    assert chunks_until_answered(traffic, number) == 10
    traffic.finish()


def test_who_shares_a_beginning_waits_for_no_more_than_it():
    traffic = quiet()
    system = [7] * PAGE
    traffic.add(Asked.of([*system, *range(30), *[2] * 2000], 8, 0, 8))
    traffic.step()
    number = traffic.add(Asked.of([*system, 5, 6, 7], 8, 0, 8))
    assert chunks_until_answered(traffic, number) == 1
    assert traffic.engine._open[number].answering.filled == PAGE + 2
    assert traffic.engine.scheduler.found == PAGE
    traffic.finish()


def test_answers_of_one_prompt_share_its_pages():
    """One prefill; the last page, which will be written on, is copied before."""
    traffic = quiet()
    prompt = asked_for(2 * PAGE + 40).request.tokens
    for seed in range(4):
        traffic.add(Asked.of(prompt, 40, seed, 8))
    traffic.finish()
    calls, scheduler = traffic.programs.calls, traffic.engine.scheduler
    assert [(chunk.start, chunk.stop) for plan in calls for chunk in plan.chunks] == [
        (0, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 2 * PAGE + 39),
    ]  # fmt: skip
    assert (scheduler.found, scheduler.asked) == (3 * (2 * PAGE + 39), 4 * (2 * PAGE + 39))
    copies = [source for plan in calls for source, _ in plan.copies if source >= RESERVED]
    assert len(copies) == 3 and len(set(copies)) == 1
    assert len({tuple(asked.heard) for asked in traffic.ended}) > 1


def test_a_page_is_not_copied_once_an_answer_is_in_it():
    """What an answer puts there may not be finite, which a page's other tokens need not have a part in."""
    traffic = quiet()
    for breaks in (1, -1):
        traffic.add(Asked.of(range(100), 40, 0, 8, breaks=breaks))
        for _ in range(3):
            traffic.step(1)
    traffic.finish()


def test_what_is_found_leaves_a_token_to_feed():
    """At most all tokens but the last, in whole pages."""
    for length, found in ((PAGE, 0), (PAGE + 1, PAGE), (2 * PAGE, PAGE), (2 * PAGE + 1, 2 * PAGE)):
        traffic = quiet()
        for _ in range(2):
            traffic.add(asked_for(length))
            traffic.finish()
        assert traffic.engine.scheduler.found == found


def test_nothing_is_found_across_salts_identities_and_weights():
    traffic = quiet()
    prompt = asked_for(3 * PAGE).request.tokens
    ways = ({}, {"salt": b"a"}, {"salt": b"b"}, {"long_context": "off"})
    for meaning, way in enumerate(ways):
        traffic.add(Asked.of(prompt, 8, 0, meaning), **way)
        traffic.finish()
    assert traffic.engine.scheduler.found == 0
    traffic.add(Asked.of(prompt, 300, 0, 0))  # its pages are of two weights
    traffic.step(1)
    traffic.new_weights()
    traffic.add(Asked.of(prompt, 8, 0, 0))
    traffic.finish()
    assert traffic.engine.scheduler.found == 2 * PAGE  # of the first one's, and nothing since


def test_a_page_whose_writer_was_given_up_is_good():
    """Its chunk was dispatched before, and calls run in their order."""
    traffic = quiet()
    number = traffic.add(asked_for(3 * PAGE))
    traffic.step()
    traffic.step()
    traffic.abort(number)
    traffic.add(asked_for(3 * PAGE))
    traffic.finish()
    assert traffic.engine.scheduler.found == 2 * PAGE
    assert [chunk.start for plan in traffic.programs.calls for chunk in plan.chunks] == [0, PAGE, 2 * PAGE]


def test_given_up_in_every_state():
    """Waiting, prefilled, decoded, preempted, ended: its pages are free at once, and nothing more is heard of it."""
    for steps in range(12):
        traffic = quiet(rows=2, pages=9)
        numbers = [traffic.add(asked_for(2 * PAGE + 1, first=n, limit=260)) for n in range(3)]
        for _ in range(steps * 4):
            traffic.step(4)
        for number in [*numbers, *numbers]:
            traffic.abort(number)
        assert traffic.engine.idle and traffic.engine.pages.available == traffic.engine.pages.usable
        assert traffic.engine.step() == []
        traffic.add(asked_for(2 * PAGE))
        traffic.finish()


def planned(pages: int, *answering: Answering, rows: int = 8) -> Scheduler:
    """A scheduler that has been asked for these, with so many pages for them."""
    scheduler = Scheduler(Pages(RESERVED + pages), rows, ((1, 128),))
    for one in answering:
        scheduler.add(one)
    return scheduler


def test_the_least_urgent_is_preempted():
    """Also where it was admitted first; and it does not come back before there is room for more than it had."""
    slow, urgent = (Answering(n, [n] * PAGE, 5 * PAGE, priority=1 - n) for n in range(2))
    scheduler = planned(13, slow)
    while slow.ahead < PAGE:
        scheduler.plan(16)
    scheduler.add(urgent)
    while urgent.ahead < urgent.limit:
        scheduler.plan(16)
        assert urgent in scheduler.running or urgent.ahead == 0
    assert scheduler.preemptions == 0  # twelve pages were promised, and one stays free
    slow, urgent = (Answering(n, [n] * PAGE, 12 * PAGE, priority=1 - n) for n in range(2))
    scheduler = planned(13, slow)
    scheduler.plan(16)
    scheduler.add(urgent)
    while not scheduler.preemptions:
        scheduler.plan(16)
    assert (scheduler.running, scheduler.waiting) == ([urgent], [slow])
    assert slow.reached > FIRST_TOKENS and slow.promised > slow.pages_for(slow.reached)


def test_few_pages_make_few_preemptions():
    """Pages promised to those that run are not promised again, so that nobody is admitted only to be preempted."""
    for limit, most in ((FIRST_TOKENS, 0), (16 * PAGE, 40)):
        scheduler = planned(20, *(Answering(n, [n] * 100, limit) for n in range(20)))
        while not scheduler.idle:
            scheduler.plan(16)
            for one in [one for one in scheduler.running if one.ahead == one.limit]:
                scheduler.end(one)
        assert scheduler.preemptions <= most


@pytest.mark.parametrize("shapes", [((1, 32),), ((2, 32), (1, 128)), ((1, 128), (1, 200))])
def test_chunks_that_would_cut_a_page_are_refused(shapes):
    with pytest.raises(ValueError, match="only smaller ones of one prompt"):
        Scheduler(Pages(9), 2, shapes)


def test_chunks_are_cut_at_pages_and_little_of_them_is_padding():
    sizes = (32, PAGE, 4 * PAGE)
    for left in range(1, 2000):
        sizes_used, rest = [], left
        while rest > 0:
            sizes_used.append(chunk_tokens(rest, sizes))
            rest -= sizes_used[-1]
        assert all(size % PAGE == 0 for size in sizes_used[:-1])
        assert -rest <= max(PAGE - 1, sizes_used[-1] // 3)
