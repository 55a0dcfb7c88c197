# SPDX-License-Identifier: Apache-2.0
"""Builds the speedrun's corpus from Python's standard library: a tokenizer and JSON Lines files.

python -m qwen2_jax.speedrun.corpus runs/speedrun/data

tokenizer/                a byte-level BPE built as Qwen2's, learned from the training text
text/{prose,code}.jsonl   {"text": ...}: docstrings and language reference, and sources
text/stories.jsonl        {"text": ...}: short stories from sentence patterns
sums.jsonl                {"prompt": ..., "completion": ...}: worksheets of sums, one line each
chats.jsonl               {"messages": [...]}: short questions of every skill
recall.jsonl              {"messages": [...]}: codes hidden in texts of up to LONG characters
held_out/*.jsonl          the same, from other documents, sums, strings and codes: a hash assigns each to one split.
                          Not all of it is unseen: one topic of the language reference, about 2% of the prose, is
                          repeated inside a longer one, and a string of four digits may equal a code
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from qwen2_jax.errors import run_and_exit
from qwen2_jax.files.atomic_folder import new_folder, write_file
from qwen2_jax.speedrun import bpe, skills, stdlib_text

SENTENCE = re.compile(r"[A-Z][a-z]+(?: [a-z,'-]+){4,18}\.")
WORD = re.compile(r"\b[a-z]{3,9}\b")
MIXED = ("sums", "sums", "sums", "copy", "copy", "compare", "small_talk")  # frequency of each skill in a chat
LONG = 3000  # characters: about 1000 tokens of such prose
Record = dict[str, object]


@dataclasses.dataclass(frozen=True)
class CorpusSize:
    """Sizes of the corpus. The defaults are the speedrun's; tests use less."""

    vocabulary: int = 2000  # learned tokens; three special ones follow
    stories: int = 3000
    sums: int = 60_000
    chats: int = 24_000  # conversations of one to ten questions
    recall: int = 8_000  # conversations about a text
    held_out: int = 200  # of each kind


def write(
    out: Path,
    size: CorpusSize = CorpusSize(),
    *,
    seed: int = 0,
    documents: Mapping[str, tuple[str, bool]] | None = None,
) -> None:
    """Writes the corpus to the folder `out`, which appears complete or not at all.

    documents: name -> (text, is_prose), by default the standard library's (stdlib_text.py). Raises UserError if `out`
    exists, OSError if the disk is too small.
    """
    documents = stdlib_text.stdlib_documents() if documents is None else documents
    train, unseen = (stdlib_text.split(dict(documents), held_out=h) for h in (False, True))

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, number])

    with new_folder(out, sum(len(text) for text, _ in documents.values())) as folder:
        tokenizer = bpe.train(tokenizer_texts(train), vocab_size=size.vocabulary)
        bpe.save(tokenizer, folder / "tokenizer", max_length=32768)
        draw = Skills.of(train, unseen, tokenizer.get_vocab())
        put = partial(write_jsonl, folder)
        put("text/prose", ({"text": t} for t, is_prose in train.values() if is_prose))
        put("text/code", ({"text": t} for t, is_prose in train.values() if not is_prose))
        put("text/stories", ({"text": t} for t in draw.stories(rng(0), size.stories)))
        put("sums", draw.worksheets(rng(1), size.sums))
        put("chats", draw.chats(rng(2), size.chats, MIXED))
        put("recall", draw.recalls(rng(3), size.recall))
        put("held_out/prose", ({"text": t} for t, is_prose in unseen.values() if is_prose))
        put("held_out/code", ({"text": t} for t, is_prose in unseen.values() if not is_prose))
        for i, kind in enumerate(("sums", "copy", "compare")):
            put(f"held_out/{kind}", draw.chats(rng(4 + i), size.held_out, (kind,), held_out=True))
        put("held_out/recall", draw.recalls(rng(9), size.held_out, held_out=True))


def write_jsonl(folder: Path, name: str, records: Iterable[Record]) -> None:
    """Writes the new file folder/NAME.jsonl."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(folder / f"{name}.jsonl", lines.encode())


def tokenizer_texts(documents: Mapping[str, tuple[str, bool]]) -> list[str]:
    """The tokenizer's training data: prose twice, code once, and enough words of the chat format."""
    questions = (*skills.SUM_QUESTIONS, *skills.COPY_QUESTIONS, *skills.RECALL_QUESTIONS, *skills.NAMED_QUESTIONS)
    talk = (*skills.COMPARE_QUESTIONS, *skills.SMALL_TALK, *skills.SMALL_TALK.values(), *skills.NAMES)
    chat = f"system\n{bpe.SYSTEM}\nuser\nassistant\n" + "\n".join((*questions, *talk))
    return [t for t, is_prose in documents.values() for _ in range(1 + is_prose)] + [chat] * 500


@dataclasses.dataclass(frozen=True)
class Skills:
    """Draws items and conversations. sentences, unseen: filler of training and of held-out texts. words, pieces: to
    make the strings that are copied."""

    sentences: list[str]
    unseen: list[str]
    words: list[str]
    pieces: list[str]

    @classmethod
    def of(cls, train: Mapping, unseen: Mapping, vocabulary: Iterable[str]) -> "Skills":
        """From documents of both splits and the tokenizer's tokens."""
        sentences, words = pools(train)
        return cls(sentences, pools(unseen)[0], words, pieces(vocabulary))

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

    def recall(
        self, rng: np.random.Generator, characters: int, *, named: bool = False, held_out: bool = False
    ) -> list[skills.Item]:
        """A text with hidden codes and the questions about them; the first question contains the text."""
        sentences = self.unseen if held_out else self.sentences
        return skills.recall(rng, sentences, characters=characters, named=named, held_out=held_out)

    def stories(self, rng: np.random.Generator, count: int) -> Iterator[str]:
        return (skills.story(rng) for _ in range(count))

    def worksheets(self, rng: np.random.Generator, count: int) -> Iterator[Record]:
        return ({"prompt": task, "completion": f"{answer}\n"} for task, answer in skills.worksheet(rng, count))

    def chats(
        self, rng: np.random.Generator, count: int, kinds: tuple[str, ...], *, held_out: bool = False
    ) -> Iterator[Record]:
        """Conversations of one to ten short questions, each of a random one of `kinds`; held out: of one."""
        for _ in range(count):
            turns = 1 if held_out else int(rng.integers(1, 11))
            yield messages(self.item(rng, skills.pick(rng, kinds), held_out=held_out) for _ in range(turns))

    def recalls(self, rng: np.random.Generator, count: int, *, held_out: bool = False) -> Iterator[Record]:
        """Conversations about texts of up to LONG characters. Short ones are more frequent: more targets per token."""
        for _ in range(count):
            named = not held_out and rng.random() < 0.3
            yield messages(self.recall(rng, int(rng.random() ** 2 * LONG), named=named, held_out=held_out))


def messages(items: Iterable[skills.Item]) -> Record:
    """Questions and answers as one conversation."""
    turns = [({"role": "user", "content": i.question}, {"role": "assistant", "content": i.answer}) for i in items]
    return {"messages": [message for turn in turns for message in turn]}


def pools(documents: Mapping[str, tuple[str, bool]]) -> tuple[list[str], list[str]]:
    """Plain sentences (filler) and words of the documents' prose, each sorted."""
    prose = [t for t, is_prose in documents.values() if is_prose]
    sentences = sorted({re.sub(r"\s+", " ", s) for t in prose for s in SENTENCE.findall(re.sub(r"\s+", " ", t))})
    counts: dict[str, int] = {}
    for t in prose:
        for word in WORD.findall(t):
            counts[word] = counts.get(word, 0) + 1
    return sentences, sorted(w for w, n in counts.items() if n >= 3)


def pieces(vocabulary: Iterable[str]) -> list[str]:
    """The tokens of two or more lower-case letters, without their leading space, sorted."""
    tokens = {token.removeprefix("\u0120") for token in vocabulary}  # a space in byte-level spelling
    return sorted(t for t in tokens if t.isascii() and t.isalpha() and t.islower() and len(t) > 1)


def main(out: tyro.conf.Positional[Path], *, seed: int = 0, size: CorpusSize = CorpusSize()) -> int:
    """Writes the speedrun's corpus to a new folder."""
    write(out, size, seed=seed)
    print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
