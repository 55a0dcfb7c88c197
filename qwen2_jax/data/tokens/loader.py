# SPDX-License-Identifier: Apache-2.0
"""Loads batches for a Data configuration. Batch s depends only on (data, seed, s), not on hosts, threads or restarts.

Each source is tokenised once (store.py), packed by a plan (packing_plan.py), and its rows are shuffled by a formula
that needs no memory. A batch is the next B rows of the mixture. To resume at batch s, start there.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qwen2_jax import validate
from qwen2_jax.console import progress_bar
from qwen2_jax.data.sources.files import library
from qwen2_jax.data.sources.records import is_store, open_records
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens import store as stores
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.data.tokens.loss_mask import Targets
from qwen2_jax.data.tokens.packing import Batch, empty_row, stack
from qwen2_jax.data.tokens.packing_plan import BestFitRows, ConcatRows, Documents, Rows, efficiency
from qwen2_jax.data.tokens.store import TokenStore, build, same_tokenizer
from qwen2_jax.errors import UserError
from qwen2_jax.parallel import hosts
from qwen2_jax.tokenizer import Tokenizer

THREADS = 4  # that prefetch rows
AHEAD = 8  # prefetched batches
HOSTS_WAIT = 24 * 3600.0  # seconds: a host may still be tokenising
Host = slice | tuple[int, int]


class Loaded:
    """The data of a run: `batches` for training, `once` for held-out data, `report` and `epochs` for the log.

    plans: the rows, in a fixed order in each plan. ranks: the largest number of sequences of a group (packing.py), 1
    without groups. groups_per_row: the largest number of groups in a row, 0 without groups.
    """

    def __init__(self, data: Data, plans: Sequence[Rows], *, seed: int, found: Sequence[stores.Meta]):
        self.data, self.plans, self._found, self._seed = data, list(plans), found, seed
        self.length, self.pad, self.ranks = plans[0].length, plans[0].pad, plans[0].ranks
        self.groups_per_row = max(plan.most_groups for plan in plans)
        self._padding = empty_row(self.length, self.pad)

    def with_ranks(self, ranks: int) -> "Loaded":
        """The same rows with groups numbered by `ranks`, so that one objective can take data with different `ranks`.

        Call it before `with_reference`. Raises UserError if this data has no groups.
        """
        if self.ranks == 1:
            raise UserError(
                f"{self.data.sources[0].path} holds no rankings, which this run learns from; give records with chosen "
                "and rejected, or with responses; where they have messages as well, add format='preference'"
            )
        plans = [plan for plan in self.plans if isinstance(plan, BestFitRows)]
        assert len(plans) == len(self.plans), "the rows have a reference already"
        plans = [plan.with_ranks(ranks) for plan in plans]
        return Loaded(self.data, plans, seed=self._seed, found=self._found)

    def with_reference(self, arrays: Sequence[np.ndarray]) -> "Loaded":
        """The same batches with reference_BT: row r of plan p has arrays[p][r], independent of the shuffle.

        arrays: float32 [rows, length] for each of `plans`, in memory or mapped; rows of padding have zeros.
        """
        shapes, wanted = [array.shape for array in arrays], [(len(plan), self.length) for plan in self.plans]
        if shapes != wanted:
            raise ValueError(f"the reference has the shapes {shapes}, and the rows {wanted}")
        plans = [_Referenced(plan, array) for plan, array in zip(self.plans, arrays, strict=True)]
        loaded = Loaded(self.data, plans, seed=self._seed, found=self._found)
        loaded._padding = self._padding._replace(reference_BT=np.zeros(self.length, np.float32))
        return loaded

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over everything; with weights, each source's rows once."""
        return sum(map(len, self.plans))

    def batches(self, rows: int, start: int = 0, host: Host = (0, 1)) -> Iterator[Batch]:
        """Endless batches of `rows` rows, starting with batch `start`, prefetched by threads.

        host: (index, count) for this host's contiguous part of each batch, or the slice of rows itself.
        """
        part = _part(rows, host)
        return _read_ahead(_Batches(self._stream(), rows, start, part))

    def once(self, rows: int, host: Host = (0, 1)) -> Iterator[Batch]:
        """Every row of every source once; the last batch is padded with empty rows.

        Each source has one fixed shuffle, so that the first batches are a fair sample: best fit puts long documents
        first, and a file may be sorted.
        """
        part = _part(rows, host)
        dataset = _grain().MapDataset
        every = dataset.concatenate([dataset.source(plan).shuffle(seed=0) for plan in self.plans])
        for begin in range(0, len(every), rows):
            numbers = range(begin + part.start, begin + part.stop)
            yield stack([every[r] if r < len(every) else self._padding for r in numbers])

    def epochs(self, batches: int, rows: int) -> list[float]:
        """Epochs of each source in `batches` batches. Raises UserError if a source exceeds its max_epochs.

        The last batch may exceed it: the number of rows is rarely a multiple of the batch size.
        """
        total = batches * rows
        if self.data.weighted:
            weights = np.array([source.weight for source in self.data.sources], float)
            counts = [
                total * share / len(plan) for share, plan in zip(weights / weights.sum(), self.plans, strict=True)
            ]
        else:
            counts = [total / len(self.plans[0])] * len(self.data.sources)
        for source, count in zip(self.data.sources, counts, strict=True):
            if source.max_epochs is not None and count - count / batches >= source.max_epochs:
                raise UserError(
                    f"{batches} batches of {rows} rows go through {source.path} {count:.2f} times, and its max_epochs "
                    f"is {source.max_epochs:g}; take fewer steps, a smaller weight or more data"
                )
        return [float(count) for count in counts]

    def report(self) -> list[dict[str, Any]]:
        """One dict per plan for a table: documents found, used and skipped, and packing efficiency."""
        table = []
        for group, plan in zip(_groups(self.data), self.plans, strict=True):
            found = list({id(self._found[i]): self._found[i] for i in group}.values())  # a store listed twice: once
            table.append(
                {
                    "source": _names(self.data, group),
                    "records": sum(meta.documents for meta in found),
                    "empty": sum(meta.empty for meta in found),
                    "untargeted": sum(meta.untargeted for meta in found),
                    **({"responses": responses} if (responses := sum(meta.responses for meta in found)) else {}),
                    **({"tied": sum(meta.tied for meta in found)} if responses else {}),
                    **dataclasses.asdict(plan.counts),
                    "rows": len(plan),
                    "efficiency": efficiency(plan),
                }
            )
        return table

    @property
    def identity(self) -> list[str]:
        """A digest of each source's tokens; a resumed run must have the same."""
        return [meta.digest for meta in self._found]

    def _stream(self) -> Any:
        """The endless sequence of rows: [i] is one row."""
        dataset = _grain().MapDataset
        # Grain's shuffle takes seed + epoch, so neighbouring seeds would repeat each other's orders: spread them.
        seeds = np.random.SeedSequence(self._seed).generate_state(len(self.plans)).tolist()
        each = [dataset.source(p).shuffle(seed=s).repeat() for p, s in zip(self.plans, seeds, strict=True)]
        if len(each) == 1:
            return each[0]
        return dataset.mix(each, weights=[source.weight for source in self.data.sources])


class _Referenced:
    """Rows with the log-probabilities of a reference: row r has those of reference[r], float32 [rows, length]."""

    def __init__(self, rows: Rows, reference: np.ndarray):
        self._rows, self._reference = rows, reference
        self.length, self.pad, self.counts = rows.length, rows.pad, rows.counts
        self.ranks, self.most_groups = rows.ranks, rows.most_groups

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, r: int) -> Batch:
        return self._rows[r]._replace(reference_BT=np.array(self._reference[r], np.float32))


class _Batches:
    """This host's part of batch start + i, as a Grain source."""

    def __init__(self, stream: Any, rows: int, start: int, part: slice):
        self._stream, self._rows, self._start, self._part = stream, rows, start, part

    def __len__(self) -> int:
        return len(self._stream) // self._rows - self._start

    def __getitem__(self, i: Any) -> Batch:
        first = (self._start + int(i)) * self._rows
        return stack([self._stream[first + row] for row in range(self._part.start, self._part.stop)])


def _part(rows: int, host: Host) -> slice:
    """The rows of a batch that belong to a host."""
    if isinstance(host, slice):
        return slice(*host.indices(rows)[:2])
    index, count = host
    validate.divides("a batch of rows", rows, "hosts", count)
    return slice(index * rows // count, (index + 1) * rows // count)


def _grain() -> Any:
    return library("grain", "training")  # takes seconds to import, and inference does not need it


def _read_ahead(source: _Batches) -> Iterator[Batch]:
    options = _grain().ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    batches = iter(_grain().MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()  # its threads


def open_data(
    data: Data, tokenizer: Tokenizer, *, length: int, seed: int, cache: Path, console: Console | None = None
) -> Loaded:
    """Tokenises sources that are not in the cache yet and plans rows of `length` tokens.

    All hosts call this; it raises UserError on all of them if their tokens differ.
    """
    if length < 1:
        raise UserError(f"rows have {length} tokens; give at least one")
    cache = data.cache or cache
    opened: dict[tuple[str, str], TokenStore] = {}
    for source in data.sources:
        if (source.path, source.format) not in opened:  # a corpus may be listed twice, with other bounds
            opened[source.path, source.format] = _open_source(source, data.targets, tokenizer, cache, console)
    found = [opened[source.path, source.format] for source in data.sources]
    ranks = _ranks(data, found)
    parts = [(store, s.min_tokens, s.max_tokens) for store, s in zip(found, data.sources, strict=True)]
    pad = tokenizer.fill_id
    plans = [
        _plan(data, Documents([parts[i] for i in group]), length, pad, ranks, _names(data, group))
        for group in _groups(data)
    ]
    loaded = Loaded(data, plans, seed=seed, found=[store.meta for store in found])
    _check_hosts(data, loaded.identity)
    return loaded


def _check_hosts(data: Data, digests: Sequence[str]) -> None:
    """Raises UserError if hosts have read different tokens: each takes its rows of one global batch."""
    facts = {f"{i} {source.path}": digest for i, (source, digest) in enumerate(zip(data.sources, digests, strict=True))}
    differing = []
    for found in hosts.differences("comparing data", facts, seconds=HOSTS_WAIT):
        first = next(who for _, who in found.values if 0 in who)
        others = sorted(i for _, who in found.values if who is not first for i in who)
        path = found.fact.partition(" ")[2]
        differing.append(f"{path} (hosts {', '.join(map(str, others[:8]))}{', ...' * (len(others) > 8)})")
    if differing:
        raise UserError(
            f"hosts have other data than host 0: {'; '.join(differing)}; give all hosts the same files, tokenizer and "
            "targets, or a cache on a disk that they share"
        )


def _open_source(
    source: Source, targets: Targets, tokenizer: Tokenizer, cache: Path, console: Console | None
) -> TokenStore:
    if source.format == "tokens" or (source.format == "auto" and is_store(source.path)):
        return _made_ahead(source, targets, tokenizer)
    inside = Path(source.path).resolve()
    if inside.is_dir() and cache.resolve().is_relative_to(inside):
        raise UserError(
            f"the cache {cache} lies inside the source {source.path}, where it would be read as data; give another "
            "cache (data.cache, or out, the folder of the run), or a source without it"
        )
    records, encoder = open_records(source.path, cache), Encoder(tokenizer, targets)
    # The format is not known yet; all chat formats share one folder, and texts have another.
    for format in ("text", "messages") if source.format == "auto" else (source.format,):
        folder = _folder(cache, source, stores.recipe(records, format, encoder))
        if (made := stores.opened(records, source.format, encoder, folder)) is not None:
            return made
    format = stores.detect(records, source.format, source.path)
    folder = _folder(cache, source, stores.recipe(records, format, encoder))
    with progress_bar(f"tokenizing {source.path}", console, in_bytes=False) as progress:
        return build(records, format, encoder, folder, name=source.path, progress=progress)


def _folder(cache: Path, source: Source, recipe: stores.Meta) -> Path:
    """Named by a digest of everything that determines the tokens, so that no folder is replaced while it is read.

    This includes the modification times of the source's files: hosts with separate copies may share one cache.
    """
    parts = (os.path.abspath(source.path), source.format, recipe.source, recipe.tokenizer, recipe.targets)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(source.path).name)[:60]}-{digest}"


def _made_ahead(source: Source, targets: Targets, tokenizer: Tokenizer) -> TokenStore:
    """A folder written by `python -m qwen2_jax.data tokenize`."""
    store = TokenStore(source.path)
    if not same_tokenizer(store.meta, tokenizer):
        raise UserError(f"{source.path} was made with another tokenizer than this run's; tokenize the data again")
    if store.meta.format != "text" and store.meta.targets != targets:
        raise UserError(
            f"{source.path} was made with targets {store.meta.targets!r}, and this run's are {targets!r}; "
            "change the run's, or tokenize the data again"
        )
    return store


def _ranks(data: Data, found: Sequence[TokenStore]) -> int:
    """The largest number of sequences in a document of any source; all sources number groups by it."""
    ranked = [store.ranks > 1 for store in found]
    if any(ranked) and not all(ranked):
        paths = [source.path for source in data.sources]
        raise UserError(
            f"{paths[ranked.index(True)]} holds rankings, and {paths[ranked.index(False)]} does not; one run takes "
            "rankings alone or none: leave out one, or name the format that is meant (format='preference')"
        )
    if any(ranked) and data.packing != "best_fit":
        raise UserError(f"data: packing is {data.packing!r}, but rankings are packed whole; give packing='best_fit'")
    return max(store.ranks for store in found)


def _plan(data: Data, documents: Documents, length: int, pad: int, ranks: int, name: str) -> Rows:
    if not len(documents):
        raise UserError(f"{name}: no document has a length between min_tokens and max_tokens; widen them")
    if data.packing == "concat":
        return ConcatRows(documents, length, pad=pad)
    rows = BestFitRows(documents, length, pad=pad, too_long=data.too_long, ranks=ranks)
    if not len(rows):
        count = len(documents)
        if data.too_long == "cut":
            raise UserError(
                f"{name}: the first {length} tokens of none of the {count} documents hold a target (their answers lie "
                "behind the cut); give longer rows"
            )
        cut = ranks == 1 and bool(documents.targets_within(np.arange(count), length + 1).any())
        raise UserError(
            f"{name}: all {count} documents are longer than rows of {length}; give longer rows"
            + ", or too_long 'cut'" * cut
        )
    return rows


def _groups(data: Data) -> list[list[int]]:
    """Indices of the sources that are packed together."""
    every = list(range(len(data.sources)))
    return [[i] for i in every] if data.weighted else [every]


def _names(data: Data, group: Sequence[int]) -> str:
    return ", ".join(data.sources[i].path for i in group)
