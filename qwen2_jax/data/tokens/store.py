# SPDX-License-Identifier: Apache-2.0
"""A tokenised corpus in a folder: written once, then memory-mapped for random access.

    tokens.u32    every document's ids, one document after another, little-endian
    offsets.i64   the start of each document, and the end of the last
    targets.bits  one bit per token, whether it is a target, lowest bit first; absent if all are
    counts.u32    trained tokens of each document; absent with targets.bits
    begins.bits   of rankings: one bit per token, whether a sequence begins there; absent for other documents
    meta.json     source, settings and counts

A record without a target (empty, or a chat without an answer) is a document of length 0, so that document and record
numbers agree.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen2_jax.data.formats import rankings, record_formats
from qwen2_jax.data.sources.records import META, TOKENS, Records
from qwen2_jax.data.tokens.encode import Encoded, Encoder
from qwen2_jax.errors import UserError
from qwen2_jax.files.atomic_folder import write_file
from qwen2_jax.files.build_once import alone_in, aside, publish
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.tokenizer import Tokenizer

VERSION = 3  # what a record becomes, or how it is stored, has changed
BATCH_RECORDS, BATCH_CHARACTERS = 1024, 1 << 22  # tokenised at once: enough for all cores, bounded memory

Progress = Callable[[int, int], Any]  # records done, records in all


@dataclasses.dataclass(frozen=True)
class Meta:
    """The contents of meta.json."""

    version: int
    source: str  # fingerprint of the files it was made from
    tokenizer: str  # fingerprint of the tokenizer and, where it is not "text", its chat template
    format: str
    targets: str  # of chats; empty where format is "text": all of a text is target
    documents: int = 0  # records of the source
    tokens: int = 0
    digest: str = ""  # of ids, target flags and begins: the same data, wherever it lies and whenever it was written
    trained: int = 0  # tokens that are targets and have a token before them
    empty: int = 0  # records left out because they are shorter than two tokens, or all answers are empty
    untargeted: int = 0  # records left out because nothing in them is a target
    responses: int = 0  # of rankings, all together
    tied: int = 0  # responses left out because another of the same record has the same score
    ranks: int = 1  # the most sequences that a document has; more than one: all of them are rankings

    @property
    def kept(self) -> int:
        """Documents with at least one target."""
        return self.documents - self.empty - self.untargeted

    @property
    def trainable(self) -> int:
        """Tokens with a token of their document before them."""
        return self.tokens - self.kept

    def same_recipe(self, other: "Meta") -> bool:
        """Whether both were made from the same data in the same way."""
        names = ("version", "source", "tokenizer", "format", "targets")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class TokenStore:
    """An opened folder. tokens: uint32 [tokens]; offsets: int64 [documents + 1]; both are memory-mapped.

    locate: returns the file and line of a document number, for messages.
    """

    def __init__(self, folder: str | Path, locate: Callable[[int], str] | None = None):
        self.folder = Path(folder)
        self._locate = locate
        self.meta = read_meta(self.folder)
        n, documents = self.meta.tokens, self.meta.documents
        self.tokens = self._map(TOKENS, "<u4", n)
        self.offsets = self._map("offsets.i64", "<i8", documents + 1)
        some = (self.folder / "targets.bits").exists()
        self._bits = self._map("targets.bits", "u1", -(-n // 8)) if some else None
        self._counts = self._map("counts.u32", "<u4", documents) if some else None
        self._begins = self._map("begins.bits", "u1", -(-n // 8)) if self.ranks > 1 else None
        if self.offsets[0] != 0 or self.offsets[-1] != n or (not some and self.meta.trained < self.meta.trainable):
            raise UserError(self._damaged("its files do not belong together"))

    def __len__(self) -> int:
        return self.meta.documents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and target flags of document i."""
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return np.asarray(self.tokens[start:stop]), self.is_target(start, stop)

    @property
    def all_targets(self) -> bool:
        """Whether every token is one."""
        return self._bits is None

    def is_target(self, start: int, stop: int) -> np.ndarray:
        """Target flags of tokens [start, stop), bool."""
        return np.ones(stop - start, bool) if self._bits is None else _flags(self._bits, start, stop)

    @property
    def ranks(self) -> int:
        """The most sequences that a document has; more than one: all of them are rankings."""
        return self.meta.ranks

    def begins(self, start: int, stop: int) -> np.ndarray | None:
        """Whether a sequence of a ranking begins there, of tokens [start, stop), bool; None: no rankings."""
        return None if self._begins is None else _flags(self._begins, start, stop)

    def target_counts(self) -> np.ndarray:
        """How many tokens of each document are trained; the first one never is, because no token precedes it."""
        return np.maximum(self.lengths - 1, 0) if self._counts is None else np.asarray(self._counts, np.int64)

    def where(self, document: int) -> str:
        """Location of this document: file and line, or the folder and number if the records are not open."""
        return self._locate(document) if self._locate else f"{self.folder} document {document + 1}"

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        path, want = self.folder / name, count * np.dtype(dtype).itemsize
        have = path.stat().st_size if path.exists() else None
        if have != want:
            raise UserError(
                self._damaged(f"{name} " + ("is missing" if have is None else f"has {have} bytes of {want}"))
            )
        return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)

    def _damaged(self, why: str) -> str:
        return f"the tokens in {self.folder} are damaged: {why}; delete that folder and run again, and it is made anew"


def _flags(bits: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Flags [start, stop) of packed ones."""
    some = np.unpackbits(bits[start // 8 : -(-stop // 8)], bitorder="little")
    return some[start % 8 : start % 8 + stop - start].astype(bool)


class _BitsFile:
    """Writes flags as bits; buffers those that do not fill a byte yet."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, np.zeros(0, bool)

    def write(self, flags: Sequence[np.ndarray]) -> None:
        joined = np.concatenate([self._left, *flags])
        whole = len(joined) // 8 * 8
        self._file.write(np.packbits(joined[:whole], bitorder="little").tobytes())
        self._left = joined[whole:]

    def end(self) -> None:
        self._file.write(np.packbits(self._left, bitorder="little").tobytes())


def read_meta(folder: Path) -> Meta:
    """The folder's meta.json."""
    try:
        data = parse_json_object((folder / META).read_bytes(), str(folder / META))
        meta = Meta(**data)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no tokens (no {META}); make them with `python -m qwen2_jax.data tokenize`"
        ) from None
    except (UserError, TypeError) as why:
        raise UserError(f"{folder / META} cannot be read ({why}); delete {folder} and run again") from None
    if meta.version != VERSION:
        raise UserError(
            f"{folder} was written as version {meta.version}, this reads {VERSION}; delete it and run again"
        )
    return meta


def tokenizer_fingerprint(tokenizer: Tokenizer, *, chat: bool) -> str:
    """A digest of the tokenizer and, with chat, of its chat template.

    Of the special tokens in tokenizer_config.json, such as eos_token, it covers only those that the template uses:
    fine-tuning changes eos_token, which most templates do not contain.
    """
    parts = [tokenizer._backend.to_str(), ""]
    if chat and (named := tokenizer.chat_templates.named):
        template = "\0".join(named[name] for name in sorted(named))
        parts[1] = template
        tokens = sorted(tokenizer._template_tokens.items())
        parts += [json.dumps(token) for token in tokens if re.search(rf"\b{token[0]}\b", template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def same_tokenizer(meta: Meta, tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer produces the same ids."""
    return meta.tokenizer == tokenizer_fingerprint(tokenizer, chat=meta.format != "text")


def recipe(records: Records, format: str, encoder: Encoder) -> Meta:
    """The Meta of a build before counting. Plain text depends on neither targets nor chat template."""
    chat = format != "text"
    fingerprint = tokenizer_fingerprint(encoder.tokenizer, chat=chat)
    return Meta(VERSION, records.fingerprint, fingerprint, format, str(encoder.targets) if chat else "")


def detect(records: Records, format: str, name: str) -> str:
    """The format; "auto": detected from the first record, and all others must have it."""
    if not len(records):
        raise UserError(f"{name} has no records")
    return record_formats.detect(records[0], records.where(0)) if format == "auto" else format


def build(
    records: Records,
    format: str,
    encoder: Encoder,
    folder: str | Path,
    *,
    name: str = "the data",
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenises the records into `folder`, or opens what is there if it was made from the same data in the same way.

    The folder is published when it is complete. Several processes may call this at once: the first one on a machine
    builds it and the others wait. Raises UserError with file and line for a record that cannot be used.
    """
    folder = Path(folder).absolute()
    if (made := opened(records, format, encoder, folder)) is not None:
        return made
    if folder.is_dir() and any(folder.iterdir()) and not (folder / META).exists():
        raise UserError(f"{folder} is in the way: it exists and holds no tokens; move it or choose another folder")
    wanted = recipe(records, detect(records, format, name), encoder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) as alone:
        if not _matches(folder, wanted):  # not built by another process while this one waited
            with aside(folder, alone) as work:
                meta = _write(records, encoder, work, wanted, name, progress)
                write_file(work / META, (json.dumps(dataclasses.asdict(meta), indent=2) + "\n").encode())
                publish(work, folder, lambda: _matches(folder, wanted))
    return TokenStore(folder, records.where)


def opened(records: Records, format: str, encoder: Encoder, folder: Path) -> TokenStore | None:
    """The store in the folder, if it was built from these records in this way; reads no record."""
    if format == "auto":  # detected then from the first record; still valid, as the files are unchanged
        try:
            format = read_meta(folder).format
        except UserError:
            return None
    return TokenStore(folder, records.where) if _matches(folder, recipe(records, format, encoder)) else None


def _matches(folder: Path, wanted: Meta) -> bool:
    try:
        return read_meta(folder).same_recipe(wanted)
    except UserError:
        return False


def _write(records: Records, encoder: Encoder, work: Path, meta: Meta, name: str, progress: Progress | None) -> Meta:
    """Writes the data files and returns the Meta to write."""
    done = total = trained = empty = untargeted = responses = tied = 0
    ranks, ranked = 1, meta.format in rankings.READERS
    digest = hashlib.sha256()
    with _files(work) as (tokens, targets_file, offsets, counts, begins_file):
        bits, begins_bits = _BitsFile(targets_file), _BitsFile(begins_file)
        offsets.write(np.zeros(1, "<i8").tobytes())
        for encoded in _encoded(records, meta.format, encoder):
            lengths, targets, flags, begins = [], [], [], []
            for document, one in encoded:
                if isinstance(document, rankings.Ranking):
                    responses += len(document.responses) + document.tied
                    tied += document.tied
                is_target = np.asarray(one.is_target, bool)
                count = int(is_target[1:].sum())
                if not count:
                    nothing = len(is_target) < 2 or (isinstance(document, record_formats.Chat) and document.is_empty)
                    empty, untargeted = empty + nothing, untargeted + (not nothing)
                lengths.append(len(is_target) if count else 0)
                targets.append(count)
                if count:
                    ids = np.asarray(one.tokens, "<u4").tobytes()
                    tokens.write(ids)
                    flags.append(is_target)
                    digest.update(len(ids).to_bytes(8, "little") + ids + is_target.tobytes())
                    if ranked:
                        begins.append(np.asarray(one.begins, bool))
                        ranks = max(ranks, int(begins[-1].sum()))
                        digest.update(begins[-1].tobytes())
            bits.write(flags)
            begins_bits.write(begins)
            ends = total + np.cumsum(lengths, dtype="<i8")
            offsets.write(ends.tobytes())
            counts.write(np.array(targets, "<u4").tobytes())
            total, trained, done = int(ends[-1]), trained + sum(targets), done + len(lengths)
            if progress:
                progress(done, len(records))
        bits.end()
        begins_bits.end()
    if not total:
        raise UserError(
            f"{name} has nothing to train on: of {len(records)} records {empty} are empty and {untargeted} have no "
            f"target; format is {meta.format!r} and targets {meta.targets!r}"
        )
    meta = dataclasses.replace(meta, digest=digest.hexdigest()[:32], documents=done, tokens=total, trained=trained)
    meta = dataclasses.replace(meta, empty=empty, untargeted=untargeted, responses=responses, tied=tied, ranks=ranks)
    if not ranked:
        (work / "begins.bits").unlink()
    if meta.trained == meta.trainable:
        (work / "targets.bits").unlink()
        (work / "counts.u32").unlink()
    return meta


Pairs = list[tuple[record_formats.Document, Encoded]]


def _encoded(records: Records, format: str, encoder: Encoder) -> Iterator[Pairs]:
    """Batches of records, parsed and encoded, in order."""
    batch: list[record_formats.Document] = []
    first = size = 0
    for i in range(len(records)):
        document = record_formats.read(records[i], format, records.where(i))
        batch.append(document)
        size += _characters(document)
        if len(batch) == BATCH_RECORDS or size > BATCH_CHARACTERS:
            yield _encode(batch, encoder, records, first)
            batch, first, size = [], i + 1, 0
    if batch:
        yield _encode(batch, encoder, records, first)


def _characters(document: record_formats.Document) -> int:
    if isinstance(document, record_formats.Text):
        return len(document.text)
    chats = document.chats if isinstance(document, record_formats.Ranking) else [document]
    return sum(len(message["content"]) for chat in chats for message in chat.messages)


def _encode(batch: list[record_formats.Document], encoder: Encoder, records: Records, first: int) -> Pairs:
    try:
        return list(zip(batch, encoder.encode_batch(batch), strict=True))
    except UserError:  # find the record, to report its line
        for i, document in enumerate(batch):
            try:
                encoder.encode(document)
            except UserError as why:
                raise UserError(f"{records.where(first + i)}: {why}") from why
        raise


@contextlib.contextmanager
def _files(work: Path) -> Iterator[tuple[IO[bytes], ...]]:
    """Opens the data files, and syncs them to disk when the block ends."""
    with contextlib.ExitStack() as stack:
        names = (TOKENS, "targets.bits", "offsets.i64", "counts.u32", "begins.bits")
        files = tuple(stack.enter_context(open(work / name, "xb")) for name in names)
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
