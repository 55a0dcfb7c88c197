# SPDX-License-Identifier: Apache-2.0
"""Plans: no token is lost or trained twice, no target crosses a document, best fit is best fit."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from few import MANY
from qwen2_jax.data.tokens import packing_plan
from qwen2_jax.errors import UserError
from token_data import MemoryStore, trained_pairs

LENGTHS = st.lists(st.integers(0, 23), max_size=30)
PAD = 10**6


@st.composite
def stores(draw):
    """One to three stores with some tokens not targets; ids are unique over all."""
    found, first = [], 0
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(LENGTHS)
        flags = np.random.default_rng(draw(st.integers(0, 99))).random(sum(lengths)) < draw(st.sampled_from([0.4, 1]))
        found.append(MemoryStore(lengths, first, flags))
        first += sum(lengths)
    return found


def documents(found, least=0, most=None):
    return packing_plan.Documents([(store, least, most) for store in found])


def check_form(rows, found):
    """What holds for every row whatever the plan: positions, segments, padding, and targets of the same document."""
    document_of = np.concatenate([np.repeat(np.arange(len(s.offsets) - 1), np.diff(s.offsets)) for s in found])
    store_of = np.repeat(np.arange(len(found)), [len(s.tokens) for s in found])
    for row in rows:
        real = row.segments_BT >= 0
        n = int(real.sum())
        assert real[:n].all()  # padding stands at the end
        assert (row.tokens_BT[n:] == PAD).all() and (row.positions_BT[n:] == -1).all() and not row.weights_BT[n:].any()
        same = np.diff(row.segments_BT[:n]) == 0
        assert row.segments_BT[0] == 0 and (np.diff(row.segments_BT[:n])[~same] == 1).all()
        assert row.positions_BT[0] == 0 and (np.diff(row.positions_BT[:n])[same] == 1).all()
        assert (row.positions_BT[1:n][~same] == 0).all()
        ids, targets = row.tokens_BT[:n], row.targets_BT[:n]
        assert (targets[:-1][same] == ids[1:][same]).all()
        assert (np.diff(document_of[ids])[same] == 0).all() and (np.diff(store_of[ids])[same] == 0).all()
        trained = row.weights_BT[:n] == 1
        assert (targets[trained] == ids[trained] + 1).all()
        assert (document_of[targets[trained]] == document_of[ids[trained]]).all()


@MANY
@given(stores(), st.integers(1, 40))
def test_concat_trains_every_target_once(found, length):
    chosen = documents(found)
    rows = packing_plan.ConcatRows(chosen, length, pad=PAD)
    every = [rows[r] for r in range(len(rows))]
    check_form(every, found)
    assert trained_pairs(every) == list(itertools.chain.from_iterable(store.pairs() for store in found))
    inputs = [int(t) for row in every for t in row.tokens_BT[row.segments_BT >= 0]]
    kept = [s.tokens[a:b] for s in found for a, b in itertools.pairwise(s.offsets) if b - a >= 2]
    assert inputs == [int(t) for t in itertools.chain.from_iterable(kept)]  # in store order, nothing between
    assert rows.counts == packing_plan.Counts(len(kept), len(inputs), len(trained_pairs(every)))
    assert all((row.segments_BT >= 0).all() for row in every[:-1])  # only the last row may be padded
    assert len(rows) == -(-len(inputs) // length)


@MANY
@given(stores(), st.integers(1, 40), st.sampled_from(["drop", "cut"]))
def test_best_fit_keeps_documents_whole(found, length, too_long):
    chosen = documents(found)
    rows = packing_plan.BestFitRows(chosen, length, pad=PAD, too_long=too_long)
    every = [rows[r] for r in range(len(rows))]
    check_form(every, found)
    if too_long == "drop":
        expected = [store.pairs(lambda n: 2 <= n <= length + 1) for store in found]
        assert rows.counts.dropped == int((chosen.lengths > length + 1).sum()) and rows.counts.cut == 0
    else:
        expected = [store.pairs(most=length + 1) for store in found]  # those without a target add nothing
        assert rows.counts.dropped + rows.counts.cut == int((chosen.lengths > length + 1).sum())
    assert trained_pairs(every) == sorted(itertools.chain.from_iterable(expected))
    assert rows.counts.targets == len(trained_pairs(every))
    assert rows.counts.tokens == sum(int((row.segments_BT >= 0).sum()) for row in every)
    assert rows.counts.documents == len(chosen) - rows.counts.dropped
    for r, row in enumerate(every):  # a segment is a document from its beginning
        assert row.segments_BT.max() + 1 == len(rows.members(r)) > 0


def test_concat_by_hand():
    """Documents of 3, 1 (nothing to learn), 0 and 5 tokens in rows of 4; the second row starts inside the last."""
    store = MemoryStore([3, 1, 0, 5], is_target=[1, 1, 0, 1, 1, 1, 1, 1, 1])
    rows = packing_plan.ConcatRows(documents([store]), 4, pad=99)
    assert len(rows) == 2
    assert [field.tolist() for field in rows[0][:5]] == [
        [0, 1, 2, 4], [1, 2, 99, 5], [1, 0, 0, 1], [0, 0, 0, 1], [0, 1, 2, 0],
    ]  # fmt: skip
    assert [field.tolist() for field in rows[1][:5]] == [
        [5, 6, 7, 8], [6, 7, 8, 99], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 2, 3],
    ]  # fmt: skip


def test_best_fit_decreasing_by_hand():
    order, edges = packing_plan.best_fit(np.array([5, 3, 3, 2, 7, 1, 4]), 8)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(edges)] == [[4, 5], [0, 1], [6, 2], [3]]


def slow_best_fit(sizes, length):
    rows, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [r for r in range(len(rows)) if room[r] >= sizes[i]]
        if fits:
            r = min(fits, key=lambda r: room[r])  # min takes the first, which is the oldest
        else:
            r = len(rows)
            rows.append([])
            room.append(length)
        rows[r].append(i)
        room[r] -= sizes[i]
    return rows


@MANY
@given(st.lists(st.integers(1, 20), max_size=60), st.sampled_from([7, 1000]))
def test_best_fit_is_the_slow_one(sizes, window):
    order, edges = packing_plan.best_fit(np.array(sizes, int), 20, window)
    expected = []
    for begin in range(0, len(sizes), window):
        expected += [[begin + i for i in row] for row in slow_best_fit(sizes[begin : begin + window], 20)]
    assert [order[a:b].tolist() for a, b in itertools.pairwise(edges)] == expected


def test_best_fit_of_many_documents_is_fast_and_full():
    """Quadratic work would take minutes; first fit of unsorted documents fills less."""
    sizes = np.random.default_rng(0).integers(1, 2000, 100_000)
    order, edges = packing_plan.best_fit(sizes, 4096)
    assert len(np.unique(order)) == len(sizes)
    assert np.add.reduceat(sizes[order], edges[:-1]).max() <= 4096
    assert sizes.sum() / ((len(edges) - 1) * 4096) > 0.999  # at most one row in a thousand more than needed


def test_documents_are_chosen_by_length():
    found = [MemoryStore([2, 5, 9, 5]), MemoryStore([4, 30], first=21)]
    rows = packing_plan.ConcatRows(documents(found, least=4, most=9), 1000, pad=PAD)
    assert rows[0].tokens_BT[: rows.counts.tokens].tolist() == [*range(2, 21), *range(21, 25)]
    found = [MemoryStore([3, 5]), MemoryStore([8, 6], first=8)]  # chosen ones lie 3 tokens behind their place in both
    rows = packing_plan.ConcatRows(documents(found, least=4, most=7), 1000, pad=PAD)
    assert rows[0].tokens_BT[: rows.counts.tokens].tolist() == [*range(3, 8), *range(16, 22)]
    found = [MemoryStore([2, 5, 9, 5])]
    split = packing_plan.Documents([(found[0], 6, None), (found[0], 0, 5)])  # one path as two sources
    assert sorted(split.lengths.tolist()) == [2, 5, 5, 9]


def test_documents_outside_are_counted():
    """Each once: of a path given twice, those that neither source takes."""
    found = [MemoryStore([2, 5, 9, 0, 14, 20]), MemoryStore([3, 30], first=50)]
    assert packing_plan.ConcatRows(documents(found, least=4, most=14), 8, pad=PAD).counts.outside == 2 + 2
    twice = packing_plan.Documents([(found[0], 14, None), (found[0], 0, 5), (found[1], 0, None)])
    assert twice.outside == 1
    assert packing_plan.BestFitRows(twice, 8, pad=PAD).counts.outside == 1


def test_flags_are_looked_at_only_where_there_are_some(monkeypatch):
    """A large text corpus would be gone through document by document at each start."""
    flagged = MemoryStore([10, 3, 10], first=30, is_target=[0] * 5 + [1] * 18)
    plain = MemoryStore([10, 10, 10])
    asked, real = [], MemoryStore.is_target
    monkeypatch.setattr(MemoryStore, "is_target", lambda self, a, b: asked.append(self) or real(self, a, b))
    counts = packing_plan.BestFitRows(documents([plain, flagged, plain]), 6, pad=PAD, too_long="cut").counts
    assert counts == packing_plan.Counts(documents=9, tokens=8 * 6 + 2, targets=6 * 6 + 2 + 2 + 6, cut=8)
    assert asked == [flagged] * 2


def test_too_long_error_names_the_first():
    chosen = documents([MemoryStore([3, 9, 12])])
    assert len(packing_plan.BestFitRows(chosen, 11, pad=PAD, too_long="error")) == 2  # the last token needs no position
    with pytest.raises(UserError, match=r"memory line 2 has 9 tokens, more than rows of 7 hold \(2 of 3"):
        packing_plan.BestFitRows(chosen, 7, pad=PAD, too_long="error")


def test_a_cut_document_without_targets_is_dropped():
    store = MemoryStore([10, 10], is_target=[0] * 9 + [1] + [0, 1] + [0] * 8)
    counts = packing_plan.BestFitRows(documents([store]), 4, pad=PAD, too_long="cut").counts
    assert counts == packing_plan.Counts(documents=1, tokens=4, targets=1, dropped=1, cut=1)
