# SPDX-License-Identifier: Apache-2.0
"""Rankings: what records mean, which tokens are targets, whole groups in rows, and a reference beside shuffled rows."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen2_jax.demo
from few import MANY
from qwen2_jax.chat_template import CHATML
from qwen2_jax.data import __main__ as command
from qwen2_jax.data.formats.record_formats import Chat, Ranking, detect, read
from qwen2_jax.data.sources.records import open_records
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens import loader, packing_plan, store
from qwen2_jax.data.tokens.encode import Encoded, Encoder
from qwen2_jax.data.tokens.store import TokenStore
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer
from token_data import MemoryStore

DEMO = Path(qwen2_jax.demo.__file__).parent
QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen2_tokenizer"
WHERE = "d.jsonl line 7"
PAD = 10**6
U, A, S, T = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system", "tool")
)
H, G = (lambda text, role=role: {"from": role, "value": text} for role in ("human", "gpt"))


def ranking(prompt, *responses):
    """Responses: texts or lists of messages, all trained."""
    given = [[A(response)] if isinstance(response, str) else response for response in responses]
    return Ranking(prompt, [Chat(response, [True] * len(response)) for response in given])


GOOD = {
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ranking([U("q")], "a", "b")),
    "preference of messages": (
        {"prompt": [S("s"), U("q"), A("r"), U("t")], "chosen": [A("a")], "rejected": "b", "tools": None},
        ranking([S("s"), U("q"), A("r"), U("t")], "a", "b"),
    ),
    "preference of several messages": (  # which both begin alike, yet the prompt is the one given
        {"prompt": "q", "chosen": [A("f()"), T("1"), A("a")], "rejected": [A("f()"), T("1"), A("b")]},
        ranking([U("q")], [A("f()"), T("1"), A("a")], [A("f()"), T("1"), A("b")]),
    ),
    "preference without a prompt": (
        {"prompt": None, "chosen": [U("q"), A("r"), U("t"), A("a")], "rejected": [U("q"), A("r"), U("t"), A("b")]},
        ranking([U("q"), A("r"), U("t")], "a", "b"),
    ),
    "preference where one goes on": (
        {"chosen": [U("q"), A("a"), U("t"), A("c")], "rejected": [U("q"), A("a")]},
        ranking([U("q")], [A("a"), U("t"), A("c")], "a"),
    ),
    "preference of UltraFeedback": (
        {"prompt": "q", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")], "score_chosen": 8.0},
        ranking([U("q")], "a", "b"),
    ),
    "preference that repeats the first of several turns": (
        {"prompt": "q", "chosen": [U("q"), A("r"), U("t"), A("a")], "rejected": [U("q"), A("r"), U("t"), A("b")]},
        ranking([U("q"), A("r"), U("t")], "a", "b"),
    ),
    "preference with a flag": (
        {"prompt": "q", "chosen": [A("f()") | {"train": False}, T("1"), A("a")], "rejected": "b"},
        Ranking([U("q")], [Chat([A("f()"), T("1"), A("a")], [False, True, True]), Chat([A("b")], [True])]),
    ),
    "ranked": ({"prompt": [U("q")], "responses": ["c", [A("a")], "b"]}, ranking([U("q")], "c", "a", "b")),
    "ranked by scores": (
        {"prompt": "q", "responses": ["b", "d", "a", "c"], "scores": [3, -1, 9.5, 0]}, ranking([U("q")], *"abcd")
    ),
    "ranked with equal scores": (  # the first of equals stays, the others are counted
        {"prompt": "q", "responses": ["b", "x", "a", "y", "z"], "scores": [3, 3, 9, 9, 3]},
        dataclasses.replace(ranking([U("q")], "a", "b"), tied=3),
    ),
    "preference with a system message and tools": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "tools": '[{"name": "f"}]'},
        dataclasses.replace(ranking([S("s"), U("q")], "a", "b"), tools=[{"name": "f"}]),
    ),
    "ranked with a system message": (
        {"prompt": "q", "responses": ["a", "b"], "system": "s"}, ranking([S("s"), U("q")], "a", "b")
    ),
    "sharegpt_ranking": (
        {"conversations": [H("q"), G("r"), H("t")], "chosen": G("a"), "rejected": G("b"), "system": "s"},
        ranking([S("s"), U("q"), A("r"), U("t")], "a", "b"),
    ),
    "alpaca_ranking": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "system": "s", "history": [["t", "r"]]},
        ranking([S("s"), U("t"), A("r"), U("q\ni")], "a", "b"),
    ),
    "alpaca_ranking in a list": (
        {"instruction": "q", "input": "", "output": ["a", "b", "c"]}, ranking([U("q")], "a", "b", "c")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_formats_and_their_detection(case):
    record, want = GOOD[case]
    format = case.split()[0]
    assert detect(record) == format
    assert read(record, format, WHERE) == read(record, "auto", WHERE) == want


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": [U("q"), A("a")], "prompt": "q", "chosen": [U("q"), A("a")], "rejected": []}, "messages"),
        ({"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}, "prompt_completion"),
        ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}, "alpaca"),
        ({"conversations": [H("q"), G("a")], "chosen": G("a"), "rejected": None}, "sharegpt"),
        ({"text": "a", "chosen": "a", "rejected": "b"}, "text"),
    ],
)
def test_other_formats_stay_what_they_are(record, format):
    assert detect(record) == format


PROMPT = {"prompt": "q"}
BAD = [
    (PROMPT | {"chosen": "a", "rejected": "a"}, "chosen equals rejected, which prefers nothing; leave the record out"),
    ({"chosen": [U("q"), A("a")], "rejected": [U("q"), A("a")]}, "chosen equals rejected"),
    (PROMPT | {"chosen": " \n", "rejected": "a"}, "chosen is empty; give an answer, or leave the record out"),
    (PROMPT | {"chosen": "a", "rejected": ""}, "rejected is empty"),
    (PROMPT | {"chosen": "a", "rejected": []}, "rejected is empty; give at least one message"),
    (PROMPT | {"chosen": "a", "rejected": 3}, "rejected is 3; it must be text or a list of messages"),
    ({"chosen": "a", "rejected": "b"}, "no prompt, and chosen does not begin with one; give a prompt, or whole"),
    ({"chosen": [U("q"), A("a")], "rejected": [A("b")]}, "no prompt, and rejected does not begin with one"),
    (
        {"chosen": [U("q"), A("a")], "rejected": [U("r"), A("b")]},
        "the prompts of chosen and rejected differ: they must be equal up to an answer, but chosen[0] has the role "
        "'user'; give answers to the same prompt",
    ),
    ({"chosen": [U("q"), A("a")], "rejected": [U("q"), U("r"), A("b")]}, "rejected[1] has the role 'user'"),
    ({"chosen": [U("q"), A("a")], "rejected": [U("q")]}, "prompts of chosen and rejected differ"),
    (
        PROMPT | {"chosen": [U("r"), A("a")], "rejected": [U("q"), A("b")]},
        "chosen begins with a message of role 'user'",
    ),
    (PROMPT | {"chosen": [U("q"), A("a")], "rejected": "b"}, "rejected begins with a message of role 'assistant' but"),
    ({"prompt": [U("q"), A("r")], "chosen": "a", "rejected": "b"}, "the prompt ends with the assistant's message"),
    (PROMPT | {"chosen": [A("a"), U("r")], "rejected": "b"}, "chosen has a message of role 'user' at its end"),
    (PROMPT | {"chosen": [A("a") | {"weight": 0}], "rejected": "b"}, "last message of chosen is not to be trained"),
    (PROMPT | {"chosen": [A("x"), S("s"), A("a")], "rejected": "b"}, "the system message is number 3"),
    (PROMPT | {"chosen": "a", "rejected": "b", "tools": [{}]}, "tools[0] has no name"),
    (
        {"prompt": [S("s"), U("q")], "chosen": "a", "rejected": "b", "system": "t"},
        "2 system messages (a field 'system'",
    ),
    (PROMPT | {"chosen": [A("a"), U("t"), A(" ")], "rejected": "b"}, "chosen ends with an empty message"),
    (PROMPT | {"responses": ["a"]}, "one response (responses[0]); a ranking needs two or more, the best first"),
    (PROMPT | {"responses": []}, "responses is empty; give at least one response"),
    (PROMPT | {"responses": "a"}, "responses is 'a'; it must be a list of responses"),
    (PROMPT | {"responses": ["a", "b", "a"]}, "responses[0] equals responses[2]"),
    (PROMPT | {"responses": ["a", ""]}, "responses[1] is empty"),
    (PROMPT | {"responses": ["a", 2]}, "responses[1] is 2; it must be text or a list of messages"),
    (PROMPT | {"responses": ["a", "b"], "scores": [1]}, "1 scores for 2 responses; give one for each"),
    (PROMPT | {"responses": ["a", "b"], "scores": [1, "2"]}, "scores[1] is '2'; it must be a finite number"),
    (PROMPT | {"responses": ["a", "b"], "scores": [float("nan"), 1]}, "scores[0] is nan; it must be a finite number"),
    (PROMPT | {"responses": ["a", "b"], "scores": [2, 2.0]}, "all 2 scores are 2, which ranks nothing; leave"),
    ({"instruction": "q", "output": ["a"]}, "one response (output[0])"),
    (
        {"conversations": [H("q")], "chosen": "a", "rejected": G("b")},
        "chosen[0] is 'a'; it must be an object with from",
    ),
    ({"conversations": [H("q"), G("r")], "chosen": G("a"), "rejected": G("b")}, "the prompt ends with the assistant's"),
]


@pytest.mark.parametrize(("record", "told"), BAD)
def test_mistakes_name_place_field_and_remedy(record, told):
    with pytest.raises(UserError) as error:
        read(record, "auto", WHERE)
    assert str(error.value).startswith(f"{WHERE}: ") and told in str(error.value)


# Which tokens are targets.


@pytest.fixture(scope="module", params=["demo", "released"])
def tokenizer(request, tmp_path_factory):
    if request.param == "demo":
        return Tokenizer.from_folder(DEMO)
    if not QWEN.exists():
        pytest.skip("no shared data: the released Qwen2 tokenizer is not here")
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copy(QWEN / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    return Tokenizer.from_folder(folder)


CONVERSATION = ranking([U("Hello"), A("Hi!"), U("2+3?")], "5.", "It's 6.", [A("f(2, 3)"), U("5"), A("5")])


@pytest.mark.parametrize(
    ("targets", "behind", "first"),
    [
        ("assistant", "", ["f(2, 3)<|im_end|>"]),
        ("assistant_newline", "\n", ["f(2, 3)<|im_end|>\n"]),
        ("last_assistant", "", []),
    ],
)
def test_only_responses_are_targets(tokenizer, targets, behind, first):
    encoded = Encoder(tokenizer, targets).encode(CONVERSATION)
    starts = np.flatnonzero(encoded.begins).tolist()
    assert len(starts) == 3 and len(encoded) == len(encoded.is_target) == len(encoded.begins)
    want = [["5.<|im_end|>"], ["It's 6.<|im_end|>"], [*first, "5<|im_end|>"]]
    want = [[*some[:-1], some[-1] + behind] for some in want]
    for (a, b), chat, texts in zip(itertools.pairwise([*starts, len(encoded)]), CONVERSATION.chats, want, strict=True):
        assert encoded.tokens[a:b] == tokenizer.chat_ids(chat.messages, add_generation_prompt=False)
        runs = itertools.groupby(
            zip(encoded.tokens[a:b], encoded.is_target[a:b], strict=True), key=lambda pair: pair[1]
        )
        read_back = [tokenizer.decode([token for token, _ in run], False) for is_target, run in runs if is_target]
        assert read_back == texts


def test_a_batch_of_all_kinds(tokenizer):
    """Rankings, chats and texts encoded at once are what they are alone."""
    encoder, other = Encoder(tokenizer), ranking([U("q")], "a", "b")
    documents = [read({"text": "x y"}, "text", WHERE), CONVERSATION, Chat([U("q"), A("a")], [True] * 2), other]
    assert encoder.encode_batch(documents) == [encoder.encode(document) for document in documents]


@pytest.mark.parametrize("targets", ["all", "turns_qwen1"])
def test_targets_of_prompts_are_refused(tokenizer, targets):
    with pytest.raises(UserError, match=f"targets '{targets}' are also tokens of the prompt.*give 'assistant'"):
        Encoder(tokenizer, targets).encode(CONVERSATION)


# Rows.


class Groups(MemoryStore):
    """Groups of sequences of the given lengths, in memory."""

    def __init__(self, groups, first=0, seed=0):
        total = sum(map(sum, groups))
        super().__init__([sum(group) for group in groups], first, np.random.default_rng(seed).random(total) < 0.5)
        self.groups, self.ranks = groups, max(map(len, groups))
        starts = np.cumsum([0, *itertools.chain.from_iterable(groups)])[:-1]
        self.marks = np.isin(np.arange(total), starts)

    def begins(self, start, stop):
        return self.marks[start:stop]


def slow_rows(stores, length, ranks):
    """Each row's five fields as lists, token by token; rows by best fit, looked for among all."""
    groups = []
    for one in stores:
        at = 0
        for sequences in one.groups:
            made = []
            for n in sequences:
                made.append([(int(one.tokens[i]), bool(one.flags[i])) for i in range(at, at + n)])
                at += n
            groups.append(made)
    groups = [group for group in groups if sum(map(len, group)) <= length]
    rows = []
    for group in sorted(groups, key=lambda group: -sum(map(len, group))):
        size = sum(map(len, group))
        rooms = [length - sum(len(s) for g in row for s in g) for row in rows]
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rows[min(fitting)[1]].append(group)
        else:
            rows.append([group])
    result = []
    for row in rows:
        tokens, targets, weights, segments, positions = [], [], [], [], []
        for number, group in enumerate(row):
            for rank, sequence in enumerate(group):
                for position, (token, _) in enumerate(sequence):
                    follows = position + 1 < len(sequence)
                    tokens.append(token)
                    targets.append(sequence[position + 1][0] if follows else PAD)
                    weights.append(float(follows and sequence[position + 1][1]))
                    segments.append(number * ranks + rank)
                    positions.append(position)
        left = length - len(tokens)
        fields = zip((tokens, targets, weights, segments, positions), (PAD, PAD, 0.0, -1, -1), strict=True)
        result.append([field + [fill] * left for field, fill in fields])
    return result


SIZES = st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=12)


@MANY
@given(st.lists(SIZES, min_size=1, max_size=2), st.integers(4, 30), st.integers(0, 9))
def test_groups_are_packed_whole(sizes, length, seed):
    stores, first = [], 0
    for groups in sizes:
        stores.append(Groups(groups, first, seed))
        first += len(stores[-1].tokens)
    rows = packing_plan.BestFitRows(packing_plan.Documents([(store, 0, None) for store in stores]), length, pad=PAD)
    ranks = max(len(group) for groups in sizes for group in groups)
    want = slow_rows(stores, length, ranks)
    assert rows.ranks == ranks and len(rows) == len(want)
    assert [[field.tolist() for field in rows[r][:5]] for r in reversed(range(len(rows)))] == want[::-1]
    assert rows.counts.dropped == sum(sum(group) > length for groups in sizes for group in groups)
    assert rows.counts.tokens == sum(position >= 0 for row in want for position in row[4])
    numbers = [max(row[3]) // ranks + 1 for row in want]
    assert rows.most_groups == max(numbers, default=0)


def test_a_group_that_fills_its_row_by_hand():
    """The last token of each sequence is an input, so 3 + 2 tokens fill a row of 5, and not one of 4."""
    store = Groups([[3, 2]])
    store.flags[:] = True
    documents = packing_plan.Documents([(store, 0, None)])
    rows = packing_plan.BestFitRows(documents, 5, pad=99, ranks=3)
    assert [field.tolist() for field in rows[0][:5]] == [
        [0, 1, 2, 3, 4], [1, 2, 99, 4, 99], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1],
    ]  # fmt: skip
    assert packing_plan.BestFitRows(documents, 4, pad=99).counts.dropped == 1
    with pytest.raises(UserError, match=r"memory line 1 has 5 tokens, more than rows of 4 .*or too_long 'drop'$"):
        packing_plan.BestFitRows(documents, 4, pad=99, too_long="error")


# From files to batches.


PAIRS = [{"prompt": f"Say {i}", "chosen": "x" * (i % 7 + 1), "rejected": f"no {i}"} for i in range(30)]
RANKED = [{"prompt": f"Rank {i}", "responses": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(9)]


@pytest.fixture
def corpus(tmp_path):
    for name, records in {"pairs": PAIRS, "ranked": RANKED, "chats": [{"messages": [U("q"), A("a")]}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def open_data(corpus, *names, weights=None, **given):
    sources = tuple(Source(path=str(corpus / name), weight=weights and weights[i]) for i, name in enumerate(names))
    data = Data(sources=sources, **({"packing": "best_fit"} | given))
    return loader.open_data(data, Tokenizer.from_folder(DEMO), length=512, seed=3, cache=corpus / "cache")


def test_a_store_of_rankings(corpus, capsys):
    """What was encoded comes back; the beginnings are part of the digest; inspect shows sequences apart."""
    tokenizer, folder = Tokenizer.from_folder(DEMO), corpus / "made"
    assert command.main(["tokenize", str(corpus / "ranked.jsonl"), str(folder), "--tokenizer", "demo"]) == 0
    made, encoder = TokenStore(folder), Encoder(tokenizer)
    assert made.ranks == made.meta.ranks == 3 and made.meta.format == "ranked" and len(made) == len(RANKED)
    for i, record in enumerate(RANKED):
        want = encoder.encode(read(record, "ranked", WHERE))
        tokens, is_target = made.document(i)
        begins = made.begins(int(made.offsets[i]), int(made.offsets[i + 1]))
        assert (tokens.tolist(), is_target.tolist(), begins.tolist()) == (want.tokens, want.is_target, want.begins)
    capsys.readouterr()
    assert command.main(["inspect", str(folder), "--tokenizer", "demo"]) == 0
    out = capsys.readouterr().out
    places = [out.index(text) for text in ("rank 1:", ">>a0<|im_end|><<", "rank 2:", ">>b0", "rank 3:", ">>c0")]
    assert places == sorted(places)
    assert command.main(["inspect", str(folder)]) == 0
    (folder / "begins.bits").unlink()
    with pytest.raises(UserError, match="begins.bits is missing; delete that folder"):
        TokenStore(folder)
    assert command.main(["tokenize", str(corpus / "chats.jsonl"), str(corpus / "other"), "--tokenizer", "demo"]) == 0
    assert TokenStore(corpus / "other").ranks == 1 and not (corpus / "other" / "begins.bits").exists()
    assert command.main(["tokenize", str(corpus / "pairs.jsonl"), str(corpus / "pairs"), "--tokenizer", "demo"]) == 0
    capsys.readouterr()
    assert command.main(["inspect", str(corpus / "pairs"), "--tokenizer", "demo"]) == 0
    out = capsys.readouterr().out
    assert "--- chosen: " in out and "--- rejected: " in out


def test_beginnings_are_part_of_the_digest(corpus, monkeypatch):
    """Equal ids and targets, other sequences: other data."""
    records, encoder = open_records(str(corpus / "pairs.jsonl"), corpus / "cache"), Encoder(Tokenizer.from_folder(DEMO))
    digests = []
    for where in (2, 3, 2):
        begins = [i in (0, where) for i in range(5)]
        encoded = Encoded([1, 2, 3, 4, 5], [False, True, False, False, True], begins)
        monkeypatch.setattr(encoder, "encode_batch", lambda documents, one=encoded: [one] * len(documents))
        made = store.build(records, "preference", encoder, corpus / f"tokens{len(digests)}")
        assert made.begins(5, 10).tolist() == begins
        digests.append(made.meta.digest)
    assert digests[0] == digests[2] != digests[1]


def sequences(batch, ranks):
    """{(row, group): {rank: trained text}} of a batch."""
    tokenizer, found = Tokenizer.from_folder(DEMO), {}
    for row, (targets, weights, segments) in enumerate(
        zip(batch.targets_BT, batch.weights_BT, batch.segments_BT, strict=True)
    ):
        for segment in sorted(set(segments[segments >= 0].tolist())):
            here = (segments == segment) & (weights > 0)
            text = tokenizer.decode(targets[here].tolist(), True)
            found.setdefault((row, segment // ranks), {})[segment % ranks] = text
    return found


@pytest.mark.parametrize("weights", [None, (1.0, 1.0)])
def test_sources_share_their_ranks(corpus, weights):
    data = open_data(corpus, "pairs.jsonl", "ranked.jsonl", weights=weights)
    assert data.ranks == 3 and len(data.plans) == (1 if weights is None else 2)
    groups, most = [], 0
    for batch in data.once(2):
        found = sequences(batch, 3)
        groups += [tuple(text for _, text in sorted(group.items())) for group in found.values()]
        most = max(most, *(number + 1 for _, number in found)) if found else most
    pairs = [(record["chosen"], record["rejected"]) for record in PAIRS]
    assert sorted(groups) == sorted(pairs + [tuple(record["responses"]) for record in RANKED])
    assert data.groups_per_row == most


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_a_reference_follows_its_rows(corpus, weights):
    """Values made of the row's own tokens stand beside these tokens in every batch, whatever the order."""
    data = open_data(corpus, "pairs.jsonl", "ranked.jsonl", weights=weights)
    mark = lambda batch: (batch.tokens_BT * 0.5 + batch.positions_BT * batch.weights_BT).astype(np.float32)
    arrays = [np.stack([mark(rows[r]) for r in range(len(rows))]) for rows in data.plans]
    (corpus / "map").mkdir()
    for i, array in enumerate(arrays):
        array.tofile(corpus / "map" / str(i))
    mapped = [np.memmap(corpus / "map" / str(i), np.float32, "r", shape=a.shape) for i, a in enumerate(arrays)]
    with_it = data.with_reference(mapped)
    assert (with_it.ranks, with_it.groups_per_row, with_it.identity) == (3, data.groups_per_row, data.identity)
    plain, batches = data.batches(3), with_it.batches(3)
    for want, got in itertools.islice(zip(plain, batches, strict=False), 2 * data.rows_per_epoch):
        assert want.reference_BT is None and got.reference_BT.dtype == np.float32
        np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
        np.testing.assert_array_equal(got.reference_BT, mark(want))
    plain.close(), batches.close()
    padded, rows = 0, data.rows_per_epoch - 1
    for got in with_it.once(rows):
        empty = (got.segments_BT < 0).all(1)
        assert not got.reference_BT[empty].any()
        np.testing.assert_array_equal(got.reference_BT[~empty], mark(got)[~empty])
        padded += int(empty.sum())
    assert padded == rows - 1 > 0
    with pytest.raises(ValueError, match="the reference has the shapes"):
        data.with_reference([array[:-1] for array in arrays])


def test_data_of_fewer_ranks_is_numbered_as_asked(corpus):
    pairs, chats = open_data(corpus, "pairs.jsonl"), open_data(corpus, "chats.jsonl")
    assert (pairs.ranks, chats.ranks, chats.groups_per_row) == (2, 1, 0)
    wider = pairs.with_ranks(3)
    assert (wider.ranks, wider.groups_per_row) == (3, pairs.groups_per_row)
    for two, three in zip(pairs.once(2), wider.once(2), strict=True):
        np.testing.assert_array_equal(two.tokens_BT, three.tokens_BT)
        assert sequences(two, 2) == sequences(three, 3)
    with pytest.raises(UserError, match="chats.jsonl holds no rankings, which this run learns from; give records"):
        chats.with_ranks(2)


def test_batches_start_anywhere(corpus):
    data = open_data(corpus, "pairs.jsonl")
    straight, later = data.batches(2), data.batches(2, start=5)
    for want, got in zip(itertools.islice(straight, 5, 9), later, strict=False):
        for a, b in zip(want[:5], got[:5], strict=True):
            np.testing.assert_array_equal(a, b)
    straight.close(), later.close()


@pytest.mark.parametrize(
    ("names", "given", "told"),
    [
        (
            ["pairs.jsonl"],
            {"packing": "concat"},
            "packing is 'concat', but rankings are packed whole; give packing='best",
        ),
        (["pairs.jsonl"], {"too_long": "cut"}, "too_long is 'cut', but rankings are never cut; give 'drop' or 'error'"),
        (["chats.jsonl", "pairs.jsonl"], {}, "pairs.jsonl holds rankings, and .*chats.jsonl does not; one run takes"),
        (["chats.jsonl", "pairs.jsonl"], {"weights": (1.0, 1.0)}, "pairs.jsonl holds rankings, and .*chats.jsonl does"),
        (["pairs.jsonl"], {"targets": "all"}, "pairs.jsonl line 1: targets 'all' are also tokens of the prompt"),
    ],
)
def test_what_rankings_do_not_go_with(corpus, names, given, told):
    with pytest.raises(UserError, match=told):
        open_data(corpus, *names, **given)
