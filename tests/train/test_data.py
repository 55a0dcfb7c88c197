# SPDX-License-Identifier: Apache-2.0
"""The split never leaks, batches are functions of (seed, step), packing keeps documents apart, the BPE is Qwen2's."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax import tokenizer as tokenizer_module
from qwen2_jax.data import bpe, chat, mixture, packing, skills, text

DATA = Path(__file__).parents[3] / "shared" / "data"
PROSE = " ".join(
    f"Return the number {i} of items found in the given list. The file is closed after it was read once more. "
    f"Each value is checked before anything else happens with the object."
    for i in range(30)
)


@pytest.fixture(scope="module")
def documents():
    return {f"module{i}.py{kind}": (PROSE, kind == "#doc") for i in range(60) for kind in ("", "#doc")}


@pytest.fixture(scope="module")
def tokenizer(documents):
    return bpe.train(mixture.tokenizer_texts(documents), vocab_size=380)


@pytest.fixture(scope="module")
def source(tokenizer, documents):
    return mixture.DemoMixture(tokenizer, documents)


def test_tokenizer_is_built_as_qwen2s(tokenizer):
    ours = json.loads(tokenizer.to_str())
    ids = [t["id"] for t in ours["added_tokens"]]
    assert [t["content"] for t in ours["added_tokens"]] == list(bpe.SPECIALS)
    assert ids == [380, 381, 382]  # at the end, in Qwen2's order
    assert bpe.padded_size(tokenizer) == 384
    if not DATA.exists():
        pytest.skip("shared data not here: structure not compared with the released tokenizer.json")
    theirs = json.loads((DATA / "qwen2_tokenizer" / "tokenizer.json").read_text("utf-8"))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        assert ours[part] == theirs[part], part
    assert {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")} == {
        k: v for k, v in theirs["model"].items() if k not in ("vocab", "merges")
    }
    flags = [{k: v for k, v in t.items() if k != "id"} for t in ours["added_tokens"]]
    assert flags == [{k: v for k, v in t.items() if k != "id"} for t in theirs["added_tokens"]]


def test_digits_stay_single_and_bytes_survive(tokenizer):
    assert len(tokenizer.encode("1234567").ids) == 7
    for text_ in ("naïve façade", "日本語", "a\tb\r\n  c", "\U0001f600"):
        assert tokenizer.decode(tokenizer.encode(text_).ids) == text_


def test_chat_ids_equal_the_template(tokenizer):
    import jinja2

    messages = [{"role": "user", "content": "What is 23 + 45?"}, {"role": "assistant", "content": "68"}]
    rendered = jinja2.Template(tokenizer_module.CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)
    encoder = chat.ChatEncoder(tokenizer)
    turn = encoder.turn("What is 23 + 45?", "68")
    assert [*encoder.system, *turn.tokens] == tokenizer.encode(rendered).ids
    targets = [t for t, is_target in zip(turn.tokens, turn.is_target, strict=True) if is_target]
    assert tokenizer.decode(targets, skip_special_tokens=False) == "68<|im_end|>"


def test_typed_special_tokens_stay_text(tokenizer):
    encoder = chat.ChatEncoder(tokenizer)
    ids = encoder.turn("say <|im_end|> now", "no").tokens
    assert ids.count(encoder.end) == 2  # the two that close the turns
    assert "say <|im_end|> now" in tokenizer.decode(ids, skip_special_tokens=False)


def test_batches_depend_on_seed_and_step_alone(source):
    shares = dict.fromkeys(mixture.KINDS, 1.0)
    make = lambda seed, step: source.batch(seed, step, rows=3, length=96, shares=shares)
    first = make(0, 5)
    for a, b in zip(first, make(0, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.tokens_BT != make(0, 6).tokens_BT).any()
    assert (first.tokens_BT != make(1, 5).tokens_BT).any()


@pytest.mark.parametrize("kind", list(mixture.KINDS))
def test_rows_are_well_formed(source, kind):
    batch = source.batch(0, 0, rows=4, length=128, shares={kind: 1.0})
    assert all(field.shape == (4, 128) for field in batch)
    assert 0.05 < batch.weights_BT.mean() <= 1
    same = batch.segments_BT[:, 1:] == batch.segments_BT[:, :-1]
    inside = same & (batch.segments_BT[:, 1:] >= 0)
    np.testing.assert_array_equal(batch.positions_BT[:, 1:][inside], batch.positions_BT[:, :-1][inside] + 1)
    assert (batch.positions_BT[:, 1:][~same & (batch.segments_BT[:, 1:] >= 0)] == 0).all()
    np.testing.assert_array_equal(batch.targets_BT[:, :-1][inside], batch.tokens_BT[:, 1:][inside])
    assert (batch.weights_BT[batch.segments_BT < 0] == 0).all()


def test_unknown_kind_is_refused(source):
    with pytest.raises(ValueError, match="unknown kinds of data"):
        source.batch(0, 0, rows=1, length=8, shares={"poems": 1.0})


def test_pack_row_by_hand():
    documents = [chat.Sequence([1, 2, 3], [True] * 3), chat.Sequence([4, 5, 6, 7], [False, False, True, True])]
    row = packing.pack_row(documents, 6, pad=9)
    assert row.tokens_BT.tolist() == [1, 2, 4, 5, 6, 9]
    assert row.targets_BT.tolist() == [2, 3, 5, 6, 7, 9]
    assert row.weights_BT.tolist() == [1, 1, 0, 1, 1, 0]
    assert row.segments_BT.tolist() == [0, 0, 1, 1, 1, -1]
    assert row.positions_BT.tolist() == [0, 1, 0, 1, 2, -1]


@pytest.mark.parametrize(
    "make", [skills.sums, skills.compare, lambda rng: skills.copy(rng, ["ape", "bee", "cat"], ["in", "ter"])]
)
def test_splits_are_disjoint(make):
    rng = np.random.default_rng(0)
    train = {skills.draw(rng, make, held_out=False).key for _ in range(1500)}
    held_out = {skills.draw(rng, make, held_out=True).key for _ in range(100)}
    assert train
    assert held_out
    assert not train & held_out


def test_sums_in_training_batches_are_never_held_out(source):
    """Reads the text of real batches back: no held-out pair, in either order, in chat or on a worksheet."""
    import re

    seen = set()
    for step in range(4):
        batch = source.batch(0, step, rows=8, length=256, shares={"worksheet": 1.0, "chat": 1.0})
        for row in batch.tokens_BT:
            decoded = source.chat.tokenizer.decode(row.tolist(), skip_special_tokens=False)
            seen |= {(int(a), int(b)) for a, b in re.findall(r"(\d\d) ?(?:\+|plus|and) ?(\d\d)(?=[ =?.<])", decoded)}
    assert len(seen) > 200
    assert not [p for p in seen if text.is_held_out(f"sum {min(p)} {max(p)}")]


def test_recall_hides_the_code_it_asks_for(source):
    rng = np.random.default_rng(0)
    for named in (False, True):
        items = skills.recall(rng, source.sentences, characters=300, named=named, held_out=True)
        assert all(f"is {item.answer}." in items[0].question for item in items)
        assert all(text.is_held_out(item.key) for item in items)


def test_stdlib_documents_reads_a_folder(tmp_path):
    doc = "A module that explains itself at some length, so that its documentation is worth reading." * 6
    (tmp_path / "good.py").write_text(f'"""{doc}"""\nx = 1\n')
    (tmp_path / "bad.py").write_text("def (:" + "#" * 500)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(f'"""{doc}"""')
    documents = text.stdlib_documents(tmp_path)
    assert list(documents) == ["good.py", "good.py#doc"]
    assert documents["good.py#doc"] == (doc, True)
    with pytest.raises(FileNotFoundError, match="no standard library"):
        text.stdlib_documents(tmp_path / "nowhere")
