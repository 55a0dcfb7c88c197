# SPDX-License-Identifier: Apache-2.0
"""The pages of a cache against a plain model of them, over random histories (--mutations N of them)."""

import random

import pytest

from qwen2_jax.infer.engine.pages import PAGE, RESERVED, Pages


class Model:
    """What a reader of pages.py's docstrings expects: everything written down, nothing clever."""

    def __init__(self, count: int):
        self.holders = dict.fromkeys(range(RESERVED, count), 0)
        self.page_of: dict[bytes, int] = {}
        self.kept: list[int] = []  # longest first

    def free(self) -> set[int]:
        return {page for page, holders in self.holders.items() if not holders and page not in self.kept}

    def forget(self, page: int) -> None:
        self.page_of = {key: other for key, other in self.page_of.items() if other != page}

    def check(self, pages: Pages) -> None:
        held = [page for page, holders in self.holders.items() if holders]
        assert len(pages._free) == len(set(pages._free)) and set(pages._free) == self.free()
        assert list(pages._kept) == self.kept
        assert len(pages._free) + len(pages._kept) + len(held) == pages.usable
        assert pages.available == len(pages._free) + len(pages._kept)
        assert {page: pages._holders[page] for page in self.holders} == self.holders
        assert pages._page_of == self.page_of
        assert pages._key_of == {page: key for key, page in self.page_of.items()}
        assert not any(pages._holders[:RESERVED])  # nobody is given the first pages
        assert set(self.kept) <= set(self.page_of.values())  # what cannot be found is free


def test_random_histories(mutations):
    for seed in mutations:
        draw = random.Random(seed)
        pages = Pages(RESERVED + draw.randint(1, 12))
        model, tables = Model(pages.count), []
        # Beginnings of prompts: a tree of keys, in which each prompt is a path.
        prompts = [[bytes([first]), bytes([first, second])] for first in range(3) for second in range(2)]
        for _ in range(60):
            random_event(draw, pages, model, tables, prompts)
            model.check(pages)
        for table in tables:
            release(pages, model, table)
        model.check(pages)
        assert pages.available == pages.usable


def random_event(draw: random.Random, pages: Pages, model: Model, tables: list, prompts: list) -> None:
    match draw.choice(("admit", "admit", "publish", "publish", "release", "withdraw", "clear", "peek")):
        case "admit":
            admit(pages, model, tables, draw.choice(prompts), draw.randint(0, 3))
        case "release" if tables:
            release(pages, model, tables.pop(draw.randrange(len(tables))))
        case "publish" if tables:
            prompt, table = draw.choice(tables)
            n = draw.randrange(2)
            if n < len(table):
                pages.publish(table[n], prompt[n])
                if prompt[n] not in model.page_of and table[n] not in model.page_of.values():
                    model.page_of[prompt[n]] = table[n]
        case "withdraw" if tables:
            _, table = draw.choice(tables)
            if table:
                pages.withdraw(table[-1])
                model.forget(table[-1])
        case "clear" if draw.random() < 0.2:
            pages.clear()
            model.page_of, model.kept = {}, []
        case "peek":
            for key in draw.choice(prompts):
                assert pages.peek(key) == model.page_of.get(key)


def admit(pages: Pages, model: Model, tables: list, prompt: list, more: int) -> None:
    """The pages of a prompt that can be found, and as many more."""
    found = pages.find(prompt)
    expected = []
    for key in prompt:
        if key not in model.page_of:
            break
        expected.append(model.page_of[key])
    assert found == expected
    for page in found:
        model.holders[page] += 1
        model.kept = [other for other in model.kept if other != page]
    table = [*found]
    free, available = model.free(), len(model.free()) + len(model.kept)
    if more > available:
        with pytest.raises(ValueError, match=f"{more} pages asked for, {available} available"):
            pages.take(more)
    else:
        taken = pages.take(more)
        evicted, model.kept = model.kept[: max(0, more - len(free))], model.kept[max(0, more - len(free)) :]
        assert len(set(taken)) == more and set(taken) <= free | set(evicted)
        assert set(evicted) <= set(taken)  # those kept longest, and only where none is free
        for page in taken:
            model.forget(page)
            model.holders[page] = 1
        table += taken
    tables.append((prompt, table))


def release(pages: Pages, model: Model, entry: tuple[list, list[int]]) -> None:
    _, table = entry
    pages.release(table)
    for page in reversed(table):
        model.holders[page] -= 1
        if not model.holders[page] and page in model.page_of.values():
            model.kept.append(page)


def test_keys_are_of_all_tokens_before_and_of_the_identity():
    pages = Pages(8)
    tokens = list(range(2 * PAGE + 5))
    keys = pages.keys(b"identity", tokens)
    assert len(keys) == len(set(keys)) == 3
    assert pages.keys(b"identity", tokens[: 2 * PAGE]) == keys[:2]
    other = pages.keys(b"identity", [*tokens[:PAGE], 7])
    assert other[0] == keys[0] and other[1] not in keys
    for other in (
        pages.keys(b"other", tokens),
        pages.keys(b"identity", [1, *tokens[1:]]),
        pages.keys(b"identity", tokens[::-1]),
        Pages(8).keys(b"identity", tokens),  # nobody knows the keys of another process
    ):
        assert not set(other) & set(keys)
    assert pages.keys(b"identity", []) == []


def test_bytes_of_a_token_are_not_taken_for_bytes_of_an_identity():
    """Else who may choose a salt finds the page of a prompt that is not his."""
    pages = Pages(8)
    assert pages.keys(b"salt", [258, 7]) != pages.keys(b"salt" + (258).to_bytes(4, "little"), [7])


def test_nothing_computed_before_new_weights_is_found_after_them():
    """Not even what is published afterwards by a request that began before."""
    pages = Pages(8)
    old = pages.keys(b"", range(2 * PAGE))
    table = pages.take(2)
    pages.publish(table[0], old[0])
    pages.clear()
    pages.publish(table[1], old[1])
    new = pages.keys(b"", range(2 * PAGE))
    assert not set(old) & set(new)
    assert pages.find(new) == []


def test_too_few_pages():
    with pytest.raises(ValueError, match="more than 1 pages, got 1"):
        Pages(RESERVED)
