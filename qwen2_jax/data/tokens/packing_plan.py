# SPDX-License-Identifier: Apache-2.0
"""Packing plans: which tokens of which documents form row r. Tokens are read when a row is indexed.

A plan is a pure function of the documents' lengths, so any host can build any row independently, in any order.
"""

import bisect
import copy
import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from qwen2_jax import validate
from qwen2_jax.data.tokens.packing import Batch, empty_row, pack_groups, pack_row
from qwen2_jax.errors import UserError

TooLong = Literal["drop", "cut", "error"]
WINDOW = 1 << 20  # documents packed together by best fit: bounds its memory at no measurable loss


class Store(Protocol):
    """Tokenised documents one after another. Documents of length 0 were skipped."""

    tokens: np.ndarray  # uint32 [tokens]
    offsets: np.ndarray  # int64 [documents + 1]

    @property
    def all_targets(self) -> bool: ...  # every token is a target, and is_target need not be called

    def is_target(self, start: int, stop: int) -> np.ndarray: ...

    def target_counts(self) -> np.ndarray: ...

    @property
    def ranks(self) -> int: ...  # the most sequences of a document; more than one: all are groups (packing.py)

    def begins(self, start: int, stop: int) -> np.ndarray | None: ...  # where sequences of groups do; None: no groups

    def where(self, document: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Document:
    """A stretch of tokens, and for each whether it is a target: what pack_row takes; with begins: pack_groups."""

    tokens: np.ndarray
    is_target: np.ndarray
    begins: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Documents:
    """The documents of one or more stores, chosen by length, numbered in store order.

    lengths: [documents] int64. starts: [documents + 1], where each begins when all are laid end to end.
    outside: how many documents of the stores are not chosen, by any of the parts that name their store.
    ranks: the most sequences of a document of the stores; 1 where none of them holds groups.
    """

    def __init__(self, parts: Sequence[tuple[Store, int, int | None]]):
        """parts: (store, fewest tokens, most tokens or None) each."""
        self._stores = [store for store, _, _ in parts]
        self.ranks = max(store.ranks for store in self._stores)
        begins, lengths, ids = [], [], []
        left: dict[int, np.ndarray] = {}  # by store: which documents no part has chosen
        for store, least, most in parts:
            offsets = np.asarray(store.offsets)
            n = np.diff(offsets)
            chosen = n >= max(2, least)  # one token alone has nothing to predict
            if most is not None:
                chosen &= n <= most
            left[id(store)] = left.get(id(store), n >= 2) & ~chosen
            (kept,) = np.nonzero(chosen)
            ids.append(kept)
            begins.append(offsets[:-1][kept])
            lengths.append(n[kept])
        self.outside = int(sum(mask.sum() for mask in left.values()))
        self._ids, self._begins = np.concatenate(ids), np.concatenate(begins)
        self._firsts = np.cumsum([0] + [len(kept) for kept in ids])  # number of each store's first document
        self.lengths = np.concatenate(lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """How many tokens of each document are trained, [documents]."""
        edges = self._firsts.tolist()
        parts = zip(self._stores, edges[:-1], edges[1:], strict=True)
        return np.concatenate([store.target_counts()[self._ids[a:b]] for store, a, b in parts])

    def targets_within(self, numbers: np.ndarray, most: int) -> np.ndarray:
        """How many of the first `most` tokens of each of these documents are trained, [numbers]."""
        found = np.minimum(self.lengths[numbers], most) - 1
        flagged = np.array([not store.all_targets for store in self._stores])
        stores = np.searchsorted(self._firsts, numbers, "right") - 1
        for k in np.nonzero(flagged[stores])[0].tolist():  # only flags must be looked at one by one
            found[k] = self.document(int(numbers[k]), most).is_target[1:].sum()
        return found

    def where(self, i: int) -> str:
        """Location of document i: its file and line."""
        return self._stores[self._store_of(i)].where(int(self._ids[i]))

    def document(self, i: int, most: int | None = None) -> Document:
        """Document i, or its first `most` tokens."""
        length = int(self.lengths[i]) if most is None else min(most, int(self.lengths[i]))
        return self._slice(self._store_of(i), int(self._begins[i]), length)

    def stretch(self, start: int, stop: int) -> Document:
        """Tokens [start, stop) of all documents laid end to end."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        # Adjacent documents of a store are read at once: a row may hold hundreds of short ones.
        shifts = self._begins[first:last] - self.starts[first:last]
        stores = np.searchsorted(self._firsts, np.arange(first, last), "right") - 1
        breaks = np.nonzero((np.diff(shifts) != 0) | (np.diff(stores) != 0))[0] + 1
        pieces = []
        for a, b in zip([0, *breaks.tolist()], [*breaks.tolist(), last - first], strict=True):
            begin = max(start, int(self.starts[first + a]))
            end = min(stop, int(self.starts[first + b]))
            pieces.append(self._slice(int(stores[a]), begin + int(shifts[a]), end - begin))
        if len(pieces) == 1:
            return pieces[0]
        return Document(np.concatenate([p.tokens for p in pieces]), np.concatenate([p.is_target for p in pieces]))

    def _store_of(self, i: int) -> int:
        return int(np.searchsorted(self._firsts, i, "right")) - 1

    def _slice(self, store: int, begin: int, length: int) -> Document:
        chosen = self._stores[store]
        here = (begin, begin + length)
        return Document(np.asarray(chosen.tokens[slice(*here)]), chosen.is_target(*here), chosen.begins(*here))


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many documents and tokens a plan uses and skips."""

    documents: int  # that are in a row, whole or in part
    tokens: int  # of them that are inputs
    targets: int  # of them that are trained
    dropped: int = 0  # documents too long for a row, skipped
    cut: int = 0  # documents too long for a row, truncated
    outside: int = 0  # documents that are shorter than min_tokens or longer than max_tokens


class Rows(Protocol):
    """Rows of one length. Row r is the same on every call and every host.

    ranks: what groups are numbered by (packing.py); 1: no groups. most_groups: that any row has, 0 without groups.
    """

    length: int
    pad: int
    counts: Counts
    ranks: int
    most_groups: int

    def __len__(self) -> int: ...

    def __getitem__(self, r: int) -> Batch: ...


def efficiency(rows: Rows) -> float:
    """The share of positions that hold a token and not padding."""
    return rows.counts.tokens / max(1, len(rows) * rows.length)


class ConcatRows:
    """All documents end to end, split every `length` tokens: for pre-training, without padding.

    A split document continues in the next row as a separate segment with positions from 0 and cannot attend to its
    beginning. No target is lost: the first token of a row is the last target of the row before.
    """

    ranks, most_groups = 1, 0

    def __init__(self, documents: Documents, length: int, *, pad: int):
        self.documents, self.length, self.pad = documents, length, pad
        self._total = int(documents.starts[-1])
        targets = int(documents.targets.sum())
        self.counts = Counts(len(documents), self._total, targets, outside=documents.outside)

    def __len__(self) -> int:
        return -(-self._total // self.length)

    def __getitem__(self, r: int) -> Batch:
        start, stop = r * self.length, min((r + 1) * self.length, self._total)
        n = stop - start
        starts = self.documents.starts
        first, last = int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, stop, "left"))
        edges = np.clip(starts[first : last + 1], start, stop) - start
        sizes = np.diff(edges)
        read = self.documents.stretch(start, min(stop + 1, self._total))  # one more: the last input's target
        row = empty_row(self.length, self.pad)
        row.tokens_BT[:n] = read.tokens[:n]
        row.targets_BT[: len(read) - 1] = read.tokens[1 : n + 1]
        row.weights_BT[: len(read) - 1] = read.is_target[1 : n + 1]
        ends = starts[first + 1 : last + 1] - start - 1  # each document's last token: nothing of its own follows
        ends = ends[ends < n]
        row.targets_BT[ends] = self.pad
        row.weights_BT[ends] = 0
        row.segments_BT[:n] = np.repeat(np.arange(last - first), sizes)
        row.positions_BT[:n] = np.arange(n) - np.repeat(edges[:-1], sizes)
        return row


class BestFitRows:
    """Whole documents, each in the fullest row with room for it: for chats, which must not be split."""

    def __init__(
        self, documents: Documents, length: int, *, pad: int, too_long: TooLong = "drop", ranks: int | None = None
    ):
        """too_long: what happens to documents of more than length + 1 tokens (the last one is only a target), and to
        groups of more than length (all are inputs), which are never cut.

        ranks: what groups are numbered by; None: the most sequences that one of these documents has.
        """
        validate.choice("too_long", too_long, ("drop", "cut", "error"))
        self.documents, self.length, self.pad = documents, length, pad
        self.ranks = documents.ranks if ranks is None else ranks
        if self.ranks > 1 and too_long == "cut":
            raise UserError("too_long is 'cut', but rankings are never cut; give 'drop' or 'error'")
        last = int(self.ranks == 1)  # token that a document may have beyond its inputs
        kept, dropped, cut, targets = _fit(documents, length, last, too_long)
        sizes = np.minimum(documents.lengths[kept], length + last) - last
        order, self._edges = best_fit(sizes, length)
        self.most_groups = int(np.diff(self._edges).max(initial=0)) if self.ranks > 1 else 0
        self._order = kept[order]
        self.counts = Counts(len(kept), int(sizes.sum()), targets, dropped, cut, documents.outside)

    def __len__(self) -> int:
        return len(self._edges) - 1

    def with_ranks(self, ranks: int) -> "BestFitRows":
        """The same rows of groups, numbered by `ranks`, which no group may exceed."""
        if not 1 < self.documents.ranks <= ranks:
            raise ValueError(f"groups of {self.documents.ranks} sequences cannot be numbered by {ranks}")
        rows = copy.copy(self)
        rows.ranks = ranks
        return rows

    def members(self, r: int) -> list[int]:
        """Numbers of the documents in row r, in their order."""
        return self._order[self._edges[r] : self._edges[r + 1]].tolist()

    def __getitem__(self, r: int) -> Batch:
        documents = [self.documents.document(i, self.length + 1) for i in self.members(r)]
        if self.ranks > 1:
            return pack_groups(documents, self.length, self.ranks, pad=self.pad)
        return pack_row(documents, self.length, pad=self.pad)


def _fit(documents: Documents, length: int, last: int, too_long: TooLong) -> tuple[np.ndarray, int, int, int]:
    """Numbers of the documents to pack, how many are dropped, how many cut, and how many tokens are trained."""
    most = length + last
    long = documents.lengths > most
    (over,) = np.nonzero(long)
    targets = int(documents.targets[~long].sum())
    if not len(over):
        return np.arange(len(documents)), 0, 0, targets
    if too_long == "error":
        first = int(over[0])
        raise UserError(
            f"{documents.where(first)} has {documents.lengths[first]} tokens, more than rows of {length} hold "
            f"({len(over)} of {len(documents)} documents do); give longer rows, or too_long 'drop'"
            + " or 'cut'"
            * (documents.ranks == 1)
        )
    if too_long == "cut":
        within = documents.targets_within(over, most)
        long[over] = within == 0  # a chat whose first answer is truncated has no target
        cut = int((within > 0).sum())
        return np.nonzero(~long)[0], len(over) - cut, cut, targets + int(within.sum())
    return np.nonzero(~long)[0], len(over), 0, targets


def best_fit(sizes: np.ndarray, length: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: numbers of the documents in the order of their rows, and where each row begins in it.

    Every `window` documents are sorted by size, the largest first, and each goes into the fullest row that has room
    for it, the oldest of equally full ones, or into a new one. sizes: positions each takes, none more than `length`.
    """
    orders, counts = [], []
    for begin in range(0, len(sizes), window):
        part = sizes[begin : begin + window]
        order = np.argsort(-part, kind="stable")
        row_of = np.fromiter(_rows_by_best_fit(part[order].tolist(), length), np.int64, len(part))
        orders.append(begin + order[np.argsort(row_of, kind="stable")])
        counts.append(np.bincount(row_of))
    none = np.zeros(0, np.int64)
    edges = np.concatenate([[0], np.cumsum(np.concatenate([none, *counts]))])
    return np.concatenate([none, *orders]), edges.astype(np.int64)


def _rows_by_best_fit(sizes: list[int], length: int):
    """The row of each document, in the given order. Rows with equal room share a heap; `rooms` is sorted."""
    rows: dict[int, list[int]] = {}  # room -> rows that have it, the oldest on top
    rooms: list[int] = []
    count = 0
    for size in sizes:
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, row = length, count
            count += 1
        else:
            room = rooms[at]
            row = heapq.heappop(rows[room])
            if not rows[room]:
                del rows[room], rooms[at]
        yield row
        if left := room - size:
            if left not in rows:
                rows[left] = []
                bisect.insort(rooms, left)
            heapq.heappush(rows[left], row)
