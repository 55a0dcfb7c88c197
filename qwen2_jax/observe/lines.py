# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object per line, in the order of the steps, also after a crash."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl; skips a line that a killed process left incomplete."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class MetricsFile:
    """Appends to a metrics.jsonl. Every line is strict JSON (NaN becomes null) and is flushed immediately."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def resume(self, step: int) -> list[Line]:
        """Truncates the file after `step`, and returns all lines that it had.

        The steps after the checkpoint are repeated and logged again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = read(self.path) if self.path.exists() else []
        aside = self.path.with_name(self.path.name + ".new")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(_text(line) for line in before if line["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return before

    def write(self, line: Line) -> None:
        """Appends one line; call `resume` first."""
        self._file.write(_text(line))
        self._file.flush()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            self._file.close()


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a line, nested ones as "outer/inner"; lists and strings are skipped."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[prefix + name] = value
    return numbers


def _text(line: Line) -> str:
    return json.dumps(_strict(line), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """The value with NaN and infinities replaced by None."""
    if isinstance(value, Mapping):
        return {str(name): _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
