# SPDX-License-Identifier: Apache-2.0
"""The token store: what goes in comes out, it is built once and whole, and damage is told."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen2_jax.demo
from few import MANY
from qwen2_jax.data.tokens import store
from qwen2_jax.errors import UserError
from qwen2_jax.files import build_once as whole
from qwen2_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(qwen2_jax.demo.__file__).parent)


class Lines:
    """Records of a file that never existed: each a text of numbers."""

    def __init__(self, texts, fingerprint="first"):
        self.texts, self.fingerprint, self.reads = texts, fingerprint, 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        self.reads += 1
        return {"text": self.texts[i]}

    def where(self, i):
        return f"data.jsonl line {i + 1}"


class Numbers:
    """An encoder for them: "3 14*" are the tokens 3 and 14, of which 14 is a target."""

    tokenizer, targets = TOKENIZER, "assistant"

    def encode(self, document):
        words = document.text.split()
        if "bad" in words:
            raise UserError("this cannot be encoded")
        return SimpleNamespace(tokens=[int(w.strip("*")) for w in words], is_target=[w.endswith("*") for w in words])

    def encode_batch(self, documents):
        return [self.encode(document) for document in documents]


def build(texts, folder, **given):
    return store.build(Lines(texts, **given), "text", Numbers(), folder)


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@MANY
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=12), max_size=20))
def test_what_goes_in_comes_out(tmp_path_factory, documents):
    documents.append([(7, False), (8, True)])  # something to learn
    folder = tmp_path_factory.mktemp("store") / "tokens"
    texts = [" ".join(f"{t}{'*' * is_target}" for t, is_target in document) for document in documents]
    made = build(texts, folder)
    kept = [d if any(is_target for _, is_target in d[1:]) else [] for d in documents]
    assert len(made) == len(documents)
    for i, document in enumerate(kept):
        tokens, is_target = made.document(i)
        assert tokens.tolist() == [token for token, _ in document]
        assert is_target[1:].tolist() == [flag for _, flag in document[1:]]  # the first one's means nothing
    assert made.target_counts().tolist() == [sum(is_target for _, is_target in d[1:]) for d in kept]
    assert made.meta.trained == sum(made.target_counts())
    assert made.meta.empty == sum(len(d) < 2 for d in documents)
    assert made.meta.untargeted == sum(len(d) > 1 and not k for d, k in zip(documents, kept, strict=True))
    assert (made.lengths > 0).sum() == made.meta.kept
    assert made.tokens.dtype == np.uint32


def test_flags_are_kept_only_where_some_token_is_none(tmp_path):
    build(["1 2* 3*", "", "4 5*"], tmp_path / "all")
    assert files(tmp_path / "all") == ["meta.json", "offsets.i64", "tokens.u32"]
    build(["1 2 3*"], tmp_path / "some")
    assert files(tmp_path / "some") == ["counts.u32", "meta.json", "offsets.i64", "targets.bits", "tokens.u32"]


def test_batches_do_not_show(tmp_path, monkeypatch):
    """Flags of a batch end inside a byte; progress counts records."""
    texts = [" ".join(f"{i}{'*' * (i % 3 == 0)}" for i in range(n)) for n in range(23)]
    whole, seen = build(texts, tmp_path / "a"), []
    monkeypatch.setattr(store, "BATCH_RECORDS", 4)
    parts = store.build(Lines(texts), "text", Numbers(), tmp_path / "b", progress=lambda *now: seen.append(now))
    for name in ("tokens.u32", "offsets.i64", "targets.bits", "counts.u32"):
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes(), name
    assert whole.meta == parts.meta
    assert seen == [(n, 23) for n in (4, 8, 12, 16, 20, 23)]


def test_built_once_and_again_when_something_changed(tmp_path, monkeypatch):
    folder, texts = tmp_path / "tokens", ["1 2*", "3 4*"]
    build(texts, folder)
    again = Lines(texts)
    store.build(again, "auto", Numbers(), folder)
    assert again.reads == 0  # not even the first, for its format
    changed = Lines(["5 6*"], "second")
    assert store.build(changed, "text", Numbers(), folder).tokens.tolist() == [5, 6]
    monkeypatch.setattr(store, "tokenizer_fingerprint", lambda tokenizer, chat: "another")
    assert store.build(Lines(["7 8*"], "second"), "text", Numbers(), folder).tokens.tolist() == [7, 8]
    assert files(tmp_path) == ["tokens"]  # no lock, nothing aside


def test_the_digest_is_that_of_the_tokens(tmp_path):
    """A copy of the data, or one with another empty record, continues a run; another flag or boundary does not."""
    digest = lambda name, texts: build(texts, tmp_path / name, fingerprint=name).meta.digest
    first = digest("a", ["1 2* 3", "4 5*"])
    assert first == digest("b", ["1 2* 3", "", "4 5*"])
    others = [digest("c", ["1 2* 3*", "4 5*"]), digest("d", ["1 2* 3 4 5*"]), digest("e", ["4 5*", "1 2* 3"])]
    assert len({first, *others}) == 4


def test_a_bad_record_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match=r"^data.jsonl line 3: this cannot be encoded"):
        build(["1 2*", "3 4*", "5 bad"], tmp_path / "tokens")
    assert files(tmp_path) == []


def test_nothing_to_learn_is_an_error(tmp_path):
    with pytest.raises(UserError, match="of 3 records 1 are empty and 2 have no target"):
        build(["1", "1* 2", "3 4"], tmp_path / "tokens")
    with pytest.raises(UserError, match="has no records"):
        build([], tmp_path / "tokens")
    assert files(tmp_path) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        build(["1 2*"], tmp_path)
    assert files(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["tokens.u32", "offsets.i64", "targets.bits", "counts.u32"])
def test_damage_is_told(tmp_path, name):
    folder = build(["1 2 3* 4", "5* 6*"], tmp_path / "tokens").folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"damaged: {name} has {len(whole) - 1} bytes of {len(whole)}; delete"):
        build(["1 2 3* 4", "5* 6*"], folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"damaged: .*delete that folder and run again"):
        store.TokenStore(folder)


def test_meta_is_checked(tmp_path):
    folder = build(["1 2*"], tmp_path / "tokens").folder
    meta = json.loads((folder / "meta.json").read_text())
    for text, told in (
        ("{", "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        (json.dumps(meta | {"version": 9}), "9"),
    ):
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match=told):
            store.TokenStore(folder)
    with pytest.raises(UserError, match="holds no tokens"):
        store.TokenStore(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk became full while tokenising; nothing was left behind"):
        build(["1 2*"], tmp_path / "tokens")
    assert files(tmp_path) == []


def test_a_faster_machine_wins(tmp_path, monkeypatch):
    """On a shared disk without locks two machines may build at once; an outdated folder may be in the way as well."""
    folder, write = tmp_path / "tokens", store._write
    build(["1 2*"], folder, fingerprint="old")

    def overtaken(*given):
        done = write(*given)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        return done

    other = build(["3 4*"], tmp_path / "other").folder
    monkeypatch.setattr(store, "_write", overtaken)
    assert build(["3 4*"], folder).tokens.tolist() == [3, 4]
    assert files(tmp_path) == ["other", "tokens"]


class Waiting(Lines):
    """Takes long enough to read that another builder comes meanwhile."""

    def __getitem__(self, i):
        time.sleep(0.1)
        return super().__getitem__(i)


def test_of_two_builders_one_works(tmp_path):
    """Threads stand for processes: the lock belongs to the opened file."""
    both = [Waiting(["1 2*", "3 4*"]) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda records: store.build(records, "text", Numbers(), tmp_path / "tokens"), both))
    assert [one.tokens.tolist() for one in made] == [[1, 2, 3, 4]] * 2
    assert sorted(records.reads for records in both) == [0, 2]
    assert files(tmp_path) == ["tokens"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_store
class Last(test_store.Lines):
    def __getitem__(self, i):
        return super().__getitem__(i) if i < 2 else os.kill(os.getpid(), signal.SIGKILL)
test_store.store.BATCH_RECORDS = 1
test_store.store.build(Last(["1 2*", "3 4*", "5 6*"]), "text", test_store.Numbers(), {folder!r})
"""


def test_a_killed_build_counts_for_nothing(tmp_path):
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "tokens"))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files(tmp_path) and not (tmp_path / "tokens").exists()
    assert build(["1 2*"], tmp_path / "tokens").tokens.tolist() == [1, 2]
    assert files(tmp_path) == ["tokens"]  # what the killed one left is gone too


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_process_of_our_number_left_is_removed(tmp_path, monkeypatch, locks):
    """A pod that starts again has the same host name and process number."""
    if not locks:  # as on Windows and some network disks
        monkeypatch.setattr(whole, "fcntl", None)
    left = [tmp_path / f"tokens.unfinished-{socket.gethostname()}-{number}" for number in (os.getpid(), os.getppid())]
    others = [tmp_path / f"tokens.unfinished-{name}-1" for name in ("another", f"{socket.gethostname()}-2")]
    for folder in (*left, *others):
        folder.mkdir()
        (folder / "tokens.u32").write_bytes(b"half")
    assert build(["1 2*"], tmp_path / "tokens").tokens.tolist() == [1, 2]
    kept = others if locks else [left[1], *others]  # without locks that one may be at work
    assert files(tmp_path) == sorted(["tokens", *(folder.name for folder in kept)])


def test_many_builders_in_turn(tmp_path):
    """Each removes the lock file behind itself; one who waited for that file must not work beside one who made anew."""
    at_work, most = 0, 0

    def visit(_):
        nonlocal at_work, most
        with whole.alone_in(tmp_path / "tokens") as held:
            assert held
            at_work += 1
            most = max(most, at_work)
            time.sleep(0.002)
            at_work -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(visit, range(60)))
    assert most == 1
    assert files(tmp_path) == []


def test_a_document_is_named_counting_from_1(tmp_path):
    folder = build(["1 2*", "3 4*"], tmp_path / "tokens").folder
    assert store.TokenStore(folder).where(1) == f"{folder} document 2"


def test_the_tokenizers_fingerprint_follows_what_the_template_writes():
    """eos_token counts where the template names it; a text needs the vocabulary only."""

    def taken(chat, template=None, **settings):
        settings |= {} if template is None else {"chat_template": template}
        return store.tokenizer_fingerprint(Tokenizer(TOKENIZER._backend, settings), chat=chat)

    plain, named = "{{ messages[0].content }}", "{{ messages[0].content + eos_token }}"
    ends = [{"eos_token": token} for token in ("<|im_end|>", "<|endoftext|>")]
    assert taken(True, plain, **ends[0]) == taken(True, plain, **ends[1]) != taken(True, "other")
    assert taken(True, named, **ends[0]) != taken(True, named, **ends[1])
    assert taken(True, named, **ends[0]) == taken(True, named, pad_token="<|im_end|>", **ends[0])
    assert taken(False, plain) == taken(False, named, **ends[0]) == taken(False)
