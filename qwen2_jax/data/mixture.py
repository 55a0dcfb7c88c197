# SPDX-License-Identifier: Apache-2.0
"""The demo's mixture of text and skills. A batch is a function of (seed, step) alone: a resumed run sees the same."""

import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from qwen2_jax.data import bpe, skills, text
from qwen2_jax.data.chat import ChatEncoder, Sequence
from qwen2_jax.data.packing import Batch, pack_row, stack

SENTENCE = re.compile(r"[A-Z][a-z]+(?: [a-z,'-]+){4,18}\.")
WORD = re.compile(r"\b[a-z]{3,9}\b")


def tokenizer_texts(documents: Mapping[str, tuple[str, bool]]) -> list[str]:
    """What the tokenizer learns from: the prose twice, the code once, and the words of the chat format often enough."""
    questions = (skills.SUM_QUESTIONS, skills.COPY_QUESTIONS, skills.RECALL_QUESTIONS, skills.NAMED_QUESTIONS)
    talk = (skills.COMPARE_QUESTIONS, skills.SMALL_TALK, skills.SMALL_TALK.values(), skills.NAMES)
    lines = itertools.chain(*questions, *talk)
    chat = f"system\n{bpe.SYSTEM}\nuser\nassistant\n" + "\n".join(lines)
    return [t for t, is_prose in documents.values() for _ in range(1 + is_prose)] + [chat] * 500


class DemoMixture:
    """Draws batches of packed rows: shares of text, chat and worksheets are probabilities per document."""

    def __init__(self, tokenizer: Tokenizer, documents: Mapping[str, tuple[str, bool]]):
        self.chat = ChatEncoder(tokenizer)
        train = text.split(dict(documents), held_out=False)
        self.prose = self._tokenize([t for t, is_prose in train.values() if is_prose])
        self.code = self._tokenize([t for t, is_prose in train.values() if not is_prose])
        self.unseen = self._tokenize(
            [t for t, is_prose in text.split(dict(documents), held_out=True).values() if is_prose]
        )
        self.sentences, self.words = pools(train)
        self.pieces = pieces(tokenizer)

    def _tokenize(self, texts: list[str]) -> np.ndarray:
        encoded = self.chat.tokenizer.encode_batch(texts, add_special_tokens=False)
        return np.concatenate([np.array([*e.ids, self.chat.end_of_text], np.int32) for e in encoded])

    def batch(self, seed: int, step: int, *, rows: int, length: int, shares: Mapping[str, float]) -> Batch:
        """Batch number `step`: [rows, length]. shares: see KINDS; they are normalised to sum to one."""
        if unknown := set(shares) - set(KINDS):
            raise ValueError(f"unknown kinds of data {sorted(unknown)}; choose from {list(KINDS)}")
        names = list(shares)
        p = np.array([shares[n] for n in names], float)
        rng = np.random.default_rng([seed, step])
        packed = []
        for _ in range(rows):
            documents: list[Sequence] = []
            room = length
            while room > 1:
                kind = names[int(rng.choice(len(names), p=p / p.sum()))]
                document = KINDS[kind](self, rng, room + 1)
                if document is None:  # nothing of this kind fits any more
                    document = self.text_chunk(rng, room + 1)
                documents.append(document)
                room -= len(document) - 1
            packed.append(pack_row(documents, length, pad=self.chat.end_of_text))
        return stack(packed)

    def held_out(self, seed: int, *, rows: int, length: int) -> dict[str, Batch]:
        """One batch [rows, length] of held-out items per kind, to watch a run by."""
        kinds: dict[str, Callable[..., Sequence | None]] = {
            **{k: partial(self.conversation, kinds=(k,), held_out=True) for k in ("sums", "copy")},
            "recall": partial(self.recall, named=False, held_out=True),
            "text": partial(self.text_chunk, held_out=True),
        }
        batches = {}
        for number, (name, make) in enumerate(kinds.items()):
            rng = np.random.default_rng([seed, 2**32, number])  # no step has so large a number
            packed = []
            for _ in range(rows):
                documents = [d for d in (make(rng, length + 1) for _ in range(20)) if d is not None]
                packed.append(pack_row(documents, length, pad=self.chat.end_of_text))
            batches[name] = stack(packed)
        return batches

    def text_chunk(self, rng: np.random.Generator, room: int, *, held_out: bool = False) -> Sequence:
        """A stretch of prose (three times in four) or code, every token a target."""
        source = self.unseen if held_out else self.prose if rng.random() < 0.75 else self.code
        n = min(room, int(rng.integers(64, 513)), len(source) - 1)
        start = int(rng.integers(len(source) - n))
        return Sequence(source[start : start + n].tolist(), [True] * n)

    def story(self, rng: np.random.Generator, room: int) -> Sequence | None:
        """One tale to its end, every token a target."""
        tokens = [*self.chat.encode(skills.story(rng)), self.chat.end_of_text]
        return Sequence(tokens, [True] * len(tokens)) if len(tokens) <= room else None

    def worksheet(self, rng: np.random.Generator, room: int) -> Sequence | None:
        """Lines of sums; only the answers are targets."""
        sheet = Sequence([], [])
        for task, answer in skills.worksheet(rng, int(rng.integers(4, 20))):
            line = Sequence([], [])
            line.add(self.chat.encode(task), False)
            line.add([*self.chat.encode(answer), *self.chat.newline], True)
            if len(sheet) + len(line) > room:
                break
            sheet.add(line.tokens, False)
            sheet.is_target[len(sheet) - len(line) :] = line.is_target
        return sheet if len(sheet) > 1 else None

    def conversation(
        self, rng: np.random.Generator, room: int, *, kinds: tuple[str, ...], held_out: bool = False
    ) -> Sequence | None:
        """One to ten short questions, each of a random skill, with their answers."""
        out = self.chat.open()
        empty = len(out)
        for _ in range(int(rng.integers(1, 11))):
            item = self.item(rng, skills.pick(rng, kinds), held_out=held_out)
            if not self._append(out, item, room):
                break
        return out if len(out) > empty else None

    def item(self, rng: np.random.Generator, kind: str, *, held_out: bool = False) -> skills.Item:
        """One short item of a skill from the wanted split."""
        if kind == "small_talk":
            return skills.small_talk(rng, self.words)
        if kind == "sums" and not held_out and rng.random() < 0.12:
            return skills.draw(rng, skills.small_sums, held_out=False)
        make: dict[str, Callable[[np.random.Generator], skills.Item]] = {
            "sums": skills.sums,
            "compare": skills.compare,
            "copy": partial(skills.copy, words=self.words, pieces=self.pieces),
        }
        return skills.draw(rng, make[kind], held_out=held_out)

    def recall(self, rng: np.random.Generator, room: int, *, named: bool, held_out: bool = False) -> Sequence | None:
        """A long text with hidden codes, then the questions."""
        out = self.chat.open()
        empty = len(out)
        budget = max(0.0, 3.2 * (room - empty) - 150)  # characters per token of such prose, less the turns around it
        share = rng.random() ** 1.5  # short ones are more frequent: they teach more per token
        items = skills.recall(rng, self.sentences, characters=int(share * budget), named=named, held_out=held_out)
        for item in items:
            if not self._append(out, item, room):
                break
        return out if len(out) > empty else None

    def _append(self, out: Sequence, item: skills.Item, room: int) -> bool:
        turn = self.chat.turn(item.question, item.answer)
        if len(out) + len(turn) > room:
            return False
        out.tokens += turn.tokens
        out.is_target += turn.is_target
        return True


KINDS: dict[str, Callable[..., Sequence | None]] = {
    "text": DemoMixture.text_chunk,
    "story": DemoMixture.story,
    "worksheet": DemoMixture.worksheet,
    "chat": partial(DemoMixture.conversation, kinds=("sums", "sums", "sums", "copy", "copy", "compare", "small_talk")),
    "sums": partial(DemoMixture.conversation, kinds=("sums",)),
    "copy": partial(DemoMixture.conversation, kinds=("copy",)),
    "recall": partial(DemoMixture.recall, named=False),
    "recall_named": partial(DemoMixture.recall, named=True),
}


def pools(documents: Mapping[str, tuple[str, bool]]) -> tuple[list[str], list[str]]:
    """Plain sentences (filler) and words of the documents' prose, each sorted so that order means nothing."""
    prose = [t for t, is_prose in documents.values() if is_prose]
    sentences = sorted({re.sub(r"\s+", " ", s) for t in prose for s in SENTENCE.findall(re.sub(r"\s+", " ", t))})
    counts: dict[str, int] = {}
    for t in prose:
        for word in WORD.findall(t):
            counts[word] = counts.get(word, 0) + 1
    return sentences, sorted(w for w, n in counts.items() if n >= 3)


def pieces(tokenizer: Tokenizer) -> list[str]:
    """The tokens of two or more lower-case letters, without their leading space, sorted."""
    tokens = {token.removeprefix("\u0120") for token in tokenizer.get_vocab()}  # the byte-level sign of a space
    return sorted(t for t in tokens if t.isascii() and t.isalpha() and t.islower() and len(t) > 1)
