# SPDX-License-Identifier: Apache-2.0
"""The pages of a cache: which are free, who holds the others, and which can be found by the tokens in them.

A page holds the keys and values of PAGE tokens. They depend on all tokens before, so a full page is known by a hash
over the whole beginning of its prompt (a chain of hashes, page by page) and over the identity of the request: what else
its cache depends on. Requests with the same beginning hold the same pages. Only pages of prompts are shared: those of
answers are computed by other products, whose last bits differ. No page that can be found is ever written again.

This file knows no arrays.
"""

import collections
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

PAGE = 128  # slots: what the kernels for TPU and GPU take at every head width and dtype
ZEROS = 0  # a page that nobody is given
RESERVED = 1  # pages that nobody is given


class Pages:
    """Pages RESERVED to count - 1. A page is free, or held by one or more requests, or kept: held by none, but found.

    `find` prefers what is kept to nothing; `take` prefers free pages to those kept longest.
    """

    def __init__(self, count: int):
        if count <= RESERVED:
            raise ValueError(f"needs more than {RESERVED} pages, got {count}")
        self.count = count
        self._free = list(range(count - 1, RESERVED - 1, -1))
        self._holders = [0] * count
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()  # longest first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._root = os.urandom(32)  # of all keys: nobody can make two beginnings collide

    @property
    def usable(self) -> int:
        """Pages that there are for requests."""
        return self.count - RESERVED

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    def take(self, number: int) -> list[int]:
        """`number` pages for one holder, with anything in them. Raises ValueError where there are not so many."""
        if number > self.available:
            raise ValueError(f"{number} pages asked for, {self.available} available")
        taken = []
        for _ in range(number):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self.withdraw(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """One holder lets go of its pages, given in the order of its tokens."""
        for page in reversed(pages):  # the end of a prompt is given away before its beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def keys(self, identity: bytes, tokens: Sequence[int]) -> list[bytes]:
        """What each full page of these tokens is known by, and behind these a key of the rest, where there is one."""
        data = np.asarray(tokens, np.int32)
        chain = [self._hash(identity)]  # of a fixed length, so that no identity can be longer by bytes of tokens
        for start in range(0, len(tokens), PAGE):
            chain.append(self._hash(chain[-1] + data[start : start + PAGE].tobytes()))
        return chain[1:]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages known by the first keys, as many as there are, now held once more."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1
            pages.append(page)
        return pages

    def peek(self, key: bytes) -> int | None:
        """The page known by a key, without holding it."""
        return self._page_of.get(key)

    def publish(self, page: int, key: bytes) -> None:
        """Lets others find a page, which its holder has filled; nothing where another is known by that key."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def withdraw(self, page: int) -> None:
        """Lets nobody find a page any more, because its holder writes on or it is given away."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def clear(self) -> None:
        """Nothing can be found any more, nor what is published by keys that were made before: for new weights."""
        self._page_of.clear()
        self._key_of.clear()
        self._free.extend(self._kept)
        self._kept.clear()
        self._root = os.urandom(32)

    def _hash(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._root, digest_size=16).digest()
