# SPDX-License-Identifier: Apache-2.0
"""Batches are a function of (data, seed, number): of nothing else, and from wherever one starts."""

import collections
import gzip
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import qwen2_jax.demo
from qwen2_jax.data import __main__ as command
from qwen2_jax.data.sources import records
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens import loader, packing_plan
from qwen2_jax.data.tokens.encode import Encoded
from qwen2_jax.errors import UserError
from qwen2_jax.parallel import hosts
from qwen2_jax.tokenizer import Tokenizer
from token_data import MemoryStore, trained_pairs

DEMO = Path(qwen2_jax.demo.__file__).parent
PAD, LENGTH = 10**6, 4
SIZES = (40, 13, 160)  # rows of the three sources


def loaded(sizes=SIZES, weights=None, seed=0):
    """Sources of one document per row, so that a row's first token names source and row."""
    stores = [MemoryStore([LENGTH + 1] * n, first=10_000 * i) for i, n in enumerate(sizes)]
    sources = tuple(Source(path=f"s{i}", weight=weights and weights[i]) for i in range(len(sizes)))
    parts = [(store, 0, None) for store in stores]
    plans = [
        packing_plan.BestFitRows(packing_plan.Documents(g), LENGTH, pad=PAD)
        for g in ([[p] for p in parts] if weights else [parts])
    ]
    return loader.Loaded(Data(sources=sources), plans, seed=seed, found=[])


def take(data, count, rows, **given):
    batches = data.batches(rows, **given)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def names(batches):
    """(source, row) of every row."""
    first = np.concatenate([batch.tokens_BT[:, 0] for batch in batches])
    return list(zip((first // 10_000).tolist(), (first % 10_000 // (LENGTH + 1)).tolist(), strict=True))


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 1.0)])
def test_the_global_batch_does_not_depend_on_hosts(weights):
    whole = take(loaded(weights=weights), 20, 4)
    for count in (2, 4):
        parts = [take(loaded(weights=weights), 20, 4, host=(index, count)) for index in range(count)]
        assert all(part[0].tokens_BT.shape == (4 // count, LENGTH) for part in parts)
        for number, batch in enumerate(whole):
            for field, *pieces in zip(batch[:5], *(part[number][:5] for part in parts), strict=True):
                np.testing.assert_array_equal(field, np.concatenate(pieces))
    sliced = take(loaded(weights=weights), 1, 4, host=slice(1, 3))[0]
    np.testing.assert_array_equal(sliced.tokens_BT, whole[0].tokens_BT[1:3])


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 1.0)])
def test_start_is_the_same_as_running_there(weights):
    straight = take(loaded(weights=weights), 90, 3)
    for start in (1, 37, 88):
        for a, b in zip(take(loaded(weights=weights), 2, 3, start=start), straight[start:], strict=False):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    data = loaded(weights=weights)
    take(data, 1, 3)  # imports
    began = time.process_time()  # not the clock on the wall: others may be busy on this machine
    take(data, 1, 3, start=10**6)
    assert time.process_time() - began < 0.5  # of walking there it would be minutes


def test_every_row_once_per_epoch_each_time_in_another_order():
    data = loaded()
    n = data.rows_per_epoch
    assert n == sum(SIZES)
    rows = names(take(data, 3, n))
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == n for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sum(a == b for a, b in zip(epochs[0], epochs[1], strict=True)) < n / 10
    sources = [source for source, _ in epochs[0]]
    assert set(sources[: n // 4]) == {0, 1, 2}  # shuffled together, not one source after another


def test_seeds_and_sources_have_orders_of_their_own():
    order = lambda seed: names(take(loaded((50, 50), (1.0, 1.0), seed), 1, 200))
    first, other = order(0), order(1)
    assert first == order(0) and first != other
    for a, b in itertools.product((first, other), repeat=2):
        for epoch, i, j in itertools.product(range(2), (0, 1), (0, 1)):
            if a is b and (i == j or epoch):
                continue
            mine, theirs = ([row for source, row in rows if source == s] for rows, s in ((a, i), (b, j)))
            shifted = theirs[epoch * 50 : (epoch + 1) * 50]
            assert sum(x == y for x, y in zip(mine, shifted, strict=False)) < 10  # neither the same nor one epoch later


@pytest.mark.parametrize("weights", [(0.3, 0.7, 1.0), (1.0, 99.0, 0.5)])
def test_shares_are_held_from_the_first_row_on(weights):
    rows = names(take(loaded(weights=weights), 10, 100))
    counts, shares = collections.Counter(), np.array(weights) / sum(weights)
    for number, (source, _) in enumerate(rows, 1):
        counts[source] += 1
        off = max(abs(counts[s] - number * share) for s, share in enumerate(shares))
        assert off <= 2 + number * 0.0025  # Grain rounds shares to a hundredth of the smallest
    for source, size in enumerate(SIZES):  # each goes round on its own, every row before any comes again
        mine = [row for s, row in rows if s == source]
        for begin in range(0, len(mine) - size + 1, size):
            assert sorted(mine[begin : begin + size]) == list(range(size))


def test_once_gives_each_row_once_and_fills_up():
    data = loaded(weights=(1.0, 2.0, 3.0))
    batches = list(data.once(50))
    assert len(batches) == -(-sum(SIZES) // 50) and all(batch.tokens_BT.shape == (50, LENGTH) for batch in batches)
    assert sorted(names(batches)[: sum(SIZES)]) == [(s, r) for s, size in enumerate(SIZES) for r in range(size)]
    assert (batches[-1].segments_BT[sum(SIZES) % 50 :] == -1).all() and not batches[-1].weights_BT[13:].any()
    halves = [list(data.once(50, host=(index, 2))) for index in range(2)]
    for whole, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole.tokens_BT, np.concatenate([part.tokens_BT for part in parts]))


@pytest.mark.parametrize("packing", [packing_plan.ConcatRows, packing_plan.BestFitRows])
def test_the_first_batches_of_once_stand_for_all(packing):
    """Documents sorted by length, as best fit has them anyway: a few batches must not hold the long ones alone."""
    lengths = [LENGTH + 1] * 100 + [2] * 400
    rows = packing(packing_plan.Documents([(MemoryStore(lengths), 0, None)]), LENGTH, pad=PAD)
    opened = lambda seed: loader.Loaded(Data(sources=(Source(path="a"),)), [rows], seed=seed, found=[])
    first = list(itertools.islice(opened(0).once(20), 3))
    whole = list(opened(0).once(20))
    short = lambda batches: np.mean([batch.tokens_BT[:, 0] >= 500 for batch in batches])  # share of rows
    assert abs(short(first) - short(whole)) < 0.15  # of 60 rows; two standard deviations are at most 0.13
    for a, b in zip(first, opened(1).once(20), strict=False):  # a run's seed does not change what is measured
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)


def test_epochs_of_a_planned_run():
    assert loaded().epochs(batches=10, rows=71) == [710 / 213] * 3
    data = loaded((10, 20), (1.0, 3.0))
    assert data.epochs(batches=8, rows=10) == [2.0, 3.0]
    limited = Data(sources=(Source(path="a", weight=1, max_epochs=2), Source(path="b", weight=3, max_epochs=2.5)))
    data.data = limited
    assert data.epochs(batches=6, rows=10) == [1.5, 2.25]
    with pytest.raises(UserError, match=r"8 batches of 10 rows go through b 3.00 times, and its max_epochs is 2.5"):
        data.epochs(batches=8, rows=10)


def test_the_last_batch_may_go_beyond_max_epochs():
    """One epoch of 10 rows is three batches of four; the rounding up is not the user's."""
    data = loaded((10,))
    data.data = Data(sources=(Source(path="a", max_epochs=1),))
    assert data.epochs(batches=3, rows=4) == [1.2]
    assert data.epochs(batches=2, rows=5) == [1.0]
    for batches, rows in ((4, 4), (3, 5)):
        with pytest.raises(UserError, match="its max_epochs is 1"):
            data.epochs(batches=batches, rows=rows)


def test_a_batch_must_divide():
    with pytest.raises(UserError, match="6 is not a multiple of hosts 4"):
        next(loaded().batches(6, host=(0, 4)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sources": ()}, "sources is empty"),
        (
            {"sources": Source(path="a")},
            r"sources is Source\(path='a'.*must be \(Source\(path=...\),\): mind the comma",
        ),
        ({"sources": "a.jsonl"}, r"sources is 'a.jsonl'; it must be \(Source\(path=...\),\): mind the comma"),
        ({"sources": ("a.jsonl",)}, r"sources\[0\] is 'a.jsonl'; it must be a Source, as \(Source\(path=...\),\)"),
        ({"sources": (Source(path="a"),), "cache": 5}, "cache is 5; it must be the path of a file or folder"),
        ({"sources": (Source(path="a", weight=1), Source(path="b"))}, "b has no weight and others have one"),
        ({"sources": (Source(path="a"),), "packing": "first_fit"}, "packing is 'first_fit'; supported: 'concat'"),
        ({"sources": (Source(path="a"),), "targets": "user"}, "targets is 'user'; supported: 'assistant'"),
    ],
)
def test_configurations_are_checked(given, told):
    with pytest.raises(UserError, match=told):
        Data(**given)


@pytest.mark.parametrize(
    "given", [{"weight": 0}, {"weight": -1}, {"format": "csv"}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_sources_are_checked(given):
    with pytest.raises(UserError, match="source a: "):
        Source(path="a", **given)


def test_paths_of_any_kind(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert Source(path=Path("a") / "b").path == "a/b"
    assert Source(path="~/a").path == Source(path=Path("~/a")).path == "/home/ada/a"
    assert Data(sources=[Source(path="a")], cache="~/c") == Data(sources=(Source(path="a"),), cache=Path("/home/ada/c"))
    for path in (None, 5, ""):
        with pytest.raises(UserError, match=f"source: path is {path!r}; it must be the path of a file or folder"):
            Source(path=path)


# With the real reader, encoder and tokenizer.


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO)


@pytest.fixture
def corpus(tmp_path):
    chats = [
        [{"role": "user", "content": f"Say {'x' * i}"}, {"role": "assistant", "content": "x" * i}] for i in range(40)
    ]
    chats[3] = chats[3][:1]  # no answer
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text number {i} says little. " * (i + 1))
    return tmp_path


def open_data(corpus, tokenizer, *sources, **given):
    where = {"length": 64, "seed": 0, "cache": corpus / "cache"}
    return loader.open_data(Data(sources=sources, **given), tokenizer, **where)


def test_from_files_to_batches_and_from_the_cache(corpus, tokenizer, monkeypatch):
    sources = (Source(path=str(corpus / "chats.jsonl"), weight=1), Source(path=str(corpus / "texts"), weight=1))
    data = open_data(corpus, tokenizer, *sources, packing="best_fit", too_long="cut")
    chats, texts = data.report()
    assert [chats[name] for name in ("records", "empty", "untargeted", "documents")] == [40, 1, 1, 38]
    assert (texts["records"], texts["empty"], texts["cut"]) == (6, 0, texts["cut"]) and 0.5 < texts["efficiency"] <= 1
    batches = list(data.once(4))
    assert sum(int(b.weights_BT.sum()) for b in batches) == chats["targets"] + texts["targets"]
    trained = [t for _, t in trained_pairs([row for b in batches[: chats["rows"] // 4] for row in [b]])]
    assert set(tokenizer.decode(trained, skip_special_tokens=False).replace("<|im_end|>", "")) == {"x"}
    monkeypatch.setattr(loader.Encoder, "encode_batch", None)  # the second time nothing is encoded
    again = open_data(corpus, tokenizer, *sources, packing="best_fit", too_long="cut")
    for a, b in zip(take(data, 5, 4), take(again, 5, 4), strict=True):
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_what_is_tokenised_is_not_read_again(corpus, tokenizer, format):
    """A restart needs the files' sizes and times only; their bytes and decompressed copies may be gone."""
    packed = corpus / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress((corpus / "chats.jsonl").read_bytes()))
    source = Source(path=str(packed), format=format)
    first = open_data(corpus, tokenizer, source)
    (copy,) = (corpus / "cache").glob("*.jsonl")
    copy.unlink()
    status = packed.stat()
    packed.write_bytes(b"x" * status.st_size)
    os.utime(packed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_data(corpus, tokenizer, source).identity == first.identity
    assert not copy.exists()
    packed.write_bytes(b"x" * status.st_size)  # a new time: now it is read
    with pytest.raises(UserError, match=r"chats.jsonl.gz: damaged"):
        open_data(corpus, tokenizer, source)


def folders(corpus):
    return {folder for folder in (corpus / "cache").iterdir() if folder.is_dir()}


def test_texts_depend_on_neither_targets_nor_template(corpus, tokenizer):
    text, chats = Source(path=str(corpus / "texts")), Source(path=str(corpus / "chats.jsonl"))
    other = Tokenizer(tokenizer._backend, {"chat_template": "{{ messages[0].content }}", "eos_token": "<|im_end|>"})
    first = open_data(corpus, tokenizer, text)
    (made,) = folders(corpus)
    for given, targets in ((tokenizer, "all"), (other, "assistant")):
        assert open_data(corpus, given, text, targets=targets).identity == first.identity
        assert open_data(corpus, given, Source(path=str(made)), targets=targets).identity == first.identity
    assert folders(corpus) == {made}
    open_data(corpus, tokenizer, chats)
    open_data(corpus, tokenizer, chats, targets="all")
    assert len(folders(corpus)) == 3  # of chats each has its own


def test_copies_with_other_times_share_a_cache(corpus, tokenizer):
    """Hosts with copies of their own: none may replace what another has mapped."""
    path = corpus / "chats.jsonl"
    opened = []
    for time_ns in (1, 2, 1):
        os.utime(path, ns=(time_ns, time_ns))
        opened.append((open_data(corpus, tokenizer, Source(path=str(path))), folders(corpus)))
    first, second, third = (data.identity for data, _ in opened)
    assert first == second == third
    assert [len(made) for _, made in opened] == [1, 2, 2]


@pytest.mark.parametrize("inside", ["", "sub/tokens"])
def test_a_cache_inside_the_data_is_refused(corpus, tokenizer, inside):
    with pytest.raises(UserError, match="the cache .* lies inside the source .*texts, where it would be read"):
        open_data(corpus, tokenizer, Source(path=str(corpus / "texts")), cache=corpus / "texts" / inside)


def test_a_format_of_token_ids(corpus, tokenizer):
    open_data(corpus, tokenizer, Source(path=str(corpus / "chats.jsonl")))
    (made,) = folders(corpus)
    with pytest.raises(UserError, match="holds token ids.*; leave its format out"):
        open_data(corpus, tokenizer, Source(path=str(made), format="messages"))


def test_hosts_must_have_the_same_tokens(corpus, tokenizer, monkeypatch):
    sources = Source(path=str(corpus / "chats.jsonl")), Source(path=str(corpus / "texts"))

    def compared(name, facts, *, seconds):
        second = list(facts)[1]
        return [hosts.Difference(second, ((facts[second], (0, 1)), ("0" * 64, (2,))))]

    open_data(corpus, tokenizer, *sources)
    with monkeypatch.context() as patch:
        patch.setattr(loader.hosts, "differences", compared)
        with pytest.raises(UserError, match=r"hosts have other data than host 0: [^ ]*texts \(hosts 2\); give all"):
            open_data(corpus, tokenizer, *sources)


def test_a_tokenizer_without_a_token_to_fill_with(corpus, tokenizer):
    bare = json.loads(tokenizer._backend.to_str()) | {"added_tokens": []}
    bare = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(bare)))
    ids = [[1, 2, 3]] * 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.Encoder, "encode_batch", lambda self, documents: [Encoded(i, [True] * 3) for i in ids])
        with pytest.raises(UserError, match="no token to fill rows with; name a pad_token or eos_token"):
            open_data(corpus, bare, Source(path=str(corpus / "texts")))


def test_one_path_as_two_sources_is_opened_once(corpus, tokenizer):
    path = str(corpus / "texts")
    short, long = Source(path=path, weight=3, max_tokens=20), Source(path=path, weight=1, min_tokens=21)
    data = open_data(corpus, tokenizer, short, long)
    assert sum(row["documents"] for row in data.report()) == 6
    assert len([folder for folder in (corpus / "cache").iterdir() if folder.is_dir()]) == 1
    both = open_data(corpus, tokenizer, Source(path=path, max_tokens=20), Source(path=path, min_tokens=21))
    (row,) = both.report()
    assert row["documents"] == row["records"] == 6 and row["outside"] == 0
    assert sum(row["outside"] for row in data.report()) == 6  # with weights each source is a group of its own
    with pytest.raises(UserError, match="no document has a length between"):
        open_data(corpus, tokenizer, Source(path=path, min_tokens=5000))


def test_a_broken_line_is_named(corpus, tokenizer):
    with open(corpus / "chats.jsonl", "a") as f:
        f.write('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(UserError, match=r"chats.jsonl line 41: messages\[0\].*content"):
        open_data(corpus, tokenizer, Source(path=str(corpus / "chats.jsonl")))


def test_tokenize_and_inspect(corpus, tokenizer, capsys):
    src, dst = str(corpus / "chats.jsonl"), str(corpus / "made")
    assert command.main(["tokenize", src, dst, "--tokenizer", "demo"]) == 0
    assert (
        "wrote" in (out := capsys.readouterr().out) and "38 documents" in out and "1 empty, 1 without a target" in out
    )
    data = open_data(corpus, tokenizer, Source(path=dst), packing="best_fit")
    direct = open_data(corpus, tokenizer, Source(path=src), packing="best_fit")
    assert data.report()[0]["targets"] == direct.report()[0]["targets"]
    np.testing.assert_array_equal(take(data, 1, 2)[0].tokens_BT, take(direct, 1, 2)[0].tokens_BT)
    assert command.main(["inspect", dst, "--tokenizer", str(DEMO)]) == 0
    assert "<|im_start|>user" in (out := capsys.readouterr().out) and "39" in out and "(median)" in out
    with pytest.raises(UserError, match="was made with targets 'assistant', and this run's are 'all'"):
        open_data(corpus, tokenizer, Source(path=dst), targets="all")


def test_inspect_sends_the_terminal_no_commands(corpus, capsys):
    (corpus / "evil.txt").write_text("title \x1b]0;owned\x07 \x1b[2J end")
    for tokenizer in ([], ["--tokenizer", "demo"]):
        dst = str(corpus / f"made{len(tokenizer)}")
        assert command.main(["tokenize", str(corpus / "evil.txt"), dst, "--tokenizer", "demo"]) == 0
        assert command.main(["inspect", dst, *tokenizer]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and "\x07" not in out and "trained tokens >>like this<<" in out
    assert r"title \x1b]0;owned\x07 \x1b[2J end" in out


def test_tokenize_unpacks_beside_its_result(corpus, monkeypatch):
    packed = corpus / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress((corpus / "chats.jsonl").read_bytes()))
    seen, real = [], records.decompressed
    monkeypatch.setattr(records, "decompressed", lambda file, cache: seen.append(cache) or real(file, cache))
    assert command.main(["tokenize", str(packed), str(corpus / "new" / "made"), "--tokenizer", "demo"]) == 0
    assert [cache.parent for cache in seen] == [corpus / "new"]
    assert [path.name for path in (corpus / "new").iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "nowhere"], "nowhere holds no tokens"),
        (["tokenize", "nowhere.jsonl", "made", "--tokenizer", "demo"], "nowhere.jsonl: no such file"),
        (["tokenize", "nowhere.jsonl", "made", "--tokenizer", "nobody"], "no model of that name"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and told in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
