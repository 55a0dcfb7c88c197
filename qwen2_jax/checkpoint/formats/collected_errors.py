# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a checkpoint, collected and reported in one error with nearest-name hints."""

import difflib
from collections.abc import Iterable, Mapping

from qwen2_jax.checkpoint.formats.names import EMBEDDING, HEAD
from qwen2_jax.errors import CheckpointError

MAX_LINE = 300  # names of tensors may come from a stranger
SHOWN = 40  # per kind: a folder of another model would otherwise list thousands


class CollectedErrors:
    """Collects what is wrong with `where`; `raise_any` reports all of it."""

    def __init__(self, where: str):
        self.where = where
        self.kinds: dict[str, list[str]] = {}

    def add(self, kind: str, lines: Iterable[str]) -> None:
        found = [line if line.isprintable() else line.encode("unicode_escape").decode() for line in lines]
        found = [line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..." for line in found]
        if found:
            self.kinds.setdefault(kind, []).extend(found)

    def compare(
        self, have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], *, broken: Iterable[str] = ()
    ) -> None:
        """Adds missing, unexpected and misshapen names. have, want: shapes by name. broken: reported already."""
        broken = set(broken)
        missing = [name for name in want if name not in have and name not in broken]
        unexpected = [name for name in have if name not in want]
        hinted = dict(zip(missing, _nearest(missing, unexpected), strict=True))
        self.add("missing", (name + (f" (is it {hinted[name]}?)" if hinted[name] else "") for name in missing))
        self.add("unexpected", unexpected)
        shapes = ((name, have[name], want[name]) for name in want if name in have)
        self.add("wrong shape", (f"{name} is {list(a)}, the config says {list(b)}" for name, a, b in shapes if a != b))
        if HEAD in missing and EMBEDDING in have:
            self.add("note", ["set tie_word_embeddings to true in config.json if the head is the embedding"])

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __str__(self) -> str:
        parts = []
        for kind, lines in self.kinds.items():
            rest = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
            parts.append(f"{kind} ({len(lines)}): " + ", ".join(lines[:SHOWN]) + rest)
        return f"{self.where} cannot be used: " + "; ".join(parts)

    def raise_any(self) -> None:
        if self:
            raise CheckpointError(str(self))


def _nearest(names: list[str], others: list[str]) -> list[str | None]:
    """For each of the first names the most similar other one; difflib is quadratic, so only as many as are shown."""
    pool = others[: 10 * SHOWN]
    hints = [next(iter(difflib.get_close_matches(name, pool, 1, 0.8)), None) for name in names[:SHOWN]]
    return hints + [None] * (len(names) - len(hints))
