# SPDX-License-Identifier: Apache-2.0
"""Configuration of a run's data: sources, their weights, and how documents are packed into rows."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args

from qwen2_jax import validate
from qwen2_jax.data.formats import record_formats
from qwen2_jax.data.tokens.loss_mask import Targets
from qwen2_jax.data.tokens.packing_plan import TooLong
from qwen2_jax.errors import UserError

Format = Literal["auto", record_formats.Format, "tokens"]
Packing = Literal["concat", "best_fit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus. A long-context mix lists the same path twice with different bounds."""

    path: str  # or a Path: file, folder or glob; or a folder made by `python -m qwen2_jax.data tokenize`
    format: Format = "auto"  # how a record is read; auto: from the first record's fields
    weight: float | None = None  # share of the rows relative to other sources; None: see Data
    min_tokens: int = 0  # shorter documents are skipped
    max_tokens: int | None = None  # longer documents are skipped
    max_epochs: float | None = None  # a run that would repeat this source more often raises an error

    def __post_init__(self):
        object.__setattr__(self, "path", _expanded("source: path", self.path))
        where = f"source {self.path}"
        validate.choice(f"{where}: format", self.format, get_args(Format))
        validate.number(self, where, ("weight", "max_epochs"), float, 0.0, none=True)
        validate.number(self, where, ("min_tokens",), int, 0)
        validate.number(self, where, ("max_tokens",), int, max(2, self.min_tokens), none=True)
        for name in ("weight", "max_epochs"):
            if getattr(self, name) == 0:
                raise UserError(f"{where}: {name} is 0; give more than 0, or leave the source out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """All sources of a run.

    Without weights, documents of all sources are packed together and every row is used once per epoch. With weights
    (every source then needs one), each source is packed separately, rows are drawn in proportion to the weights, and
    each source has its own epochs. With concat packing rows are full, so the weights also apply to tokens; with
    best_fit, a source whose rows have more padding gets fewer tokens than its weight.
    """

    sources: tuple[Source, ...]
    packing: Packing = "concat"  # concat: documents end to end, split at row ends. best_fit: whole documents, for chats
    too_long: TooLong = "drop"  # best_fit: what to do with a document longer than a row
    targets: Targets = "assistant"  # which tokens of a chat are targets; in plain text all are
    cache: Path | None = None  # folder for tokenized data; None: in the run's folder

    def __post_init__(self):
        validate.choice("data: packing", self.packing, get_args(Packing))
        validate.choice("data: too_long", self.too_long, get_args(TooLong))
        validate.choice("data: targets", self.targets, get_args(Targets))
        _check_sources(self.sources)
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.cache is not None:
            object.__setattr__(self, "cache", Path(_expanded("data: cache", self.cache)))
        if not self.sources:
            raise UserError("data: sources is empty; give at least one")
        without = [source.path for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise UserError(
                f"data: {', '.join(without)} has no weight and others have one; give all of them one, or none"
            )

    @property
    def weighted(self) -> bool:
        """Whether sources are mixed by weight."""
        return self.sources[0].weight is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
    """Prompts for stages that sample completions; prompts.py describes the records."""

    sources: tuple[str, ...]  # files, folders or globs
    max_tokens: int = 1024  # longer prompts are skipped

    def __post_init__(self):
        validate.number(self, "data", ("max_tokens",), int, 1)
        if isinstance(self.sources, str) or not self.sources:
            raise UserError(f"data: sources is {validate.short(self.sources)}; it must be (PATH,): mind the comma")
        object.__setattr__(self, "sources", tuple(_expanded("data: sources", path) for path in self.sources))


def _expanded(where: str, path: str | os.PathLike[str]) -> str:
    """The path as text, with ~ replaced by the user's folder."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UserError(f"{where} is {validate.short(path)}; it must be the path of a file or folder")
    return os.path.expanduser(os.fspath(path))


def _check_sources(sources: Any) -> None:
    if not isinstance(sources, tuple | list):
        raise UserError(f"data: sources is {validate.short(sources)}; it must be (Source(path=...),): mind the comma")
    for i, source in enumerate(sources):
        if not isinstance(source, Source):
            raise UserError(
                f"data: sources[{i}] is {validate.short(source)}; it must be a Source, as (Source(path=...),)"
            )
