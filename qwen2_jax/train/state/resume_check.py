# SPDX-License-Identifier: Apache-2.0
"""Compares a checkpoint's settings with those of the run that continues it, and describes the differences."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2_jax import validate

NOT_COMPARED = ("out", "resume", "dry_run", "log")  # settings of a single start, not of the training


def as_read(value: Any) -> Any:
    """A value as it is after JSON: tuples become lists, and keys strings."""
    return json.loads(json.dumps(value))


def describe(leaf: Any) -> str:
    """dtype and shape of an array, as "float32[3,4]"."""
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"


def refused(old: Any, new: Any, meanings: Mapping[str, str]) -> list[str]:
    """Every field that differs, as "model.hidden_size: 48 -> 64", or its message in `meanings`."""
    return [
        meanings.get(name, f"{name}: {validate.short(a)} -> {validate.short(b)}") for name, a, b in _fields(old, new)
    ]


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for every setting that differs from the checkpoint's."""
    before, now = ({name: x for name, x in settings.items() if name not in NOT_COMPARED} for settings in (old, new))
    found = _fields(before, now)
    return [f"changed since the checkpoint: {name} {validate.short(a)} -> {validate.short(b)}" for name, a, b in found]


def _fields(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old value, new value) of every field that differs; items of equally long lists are fields, too."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(i): value for i, value in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for field in dict.fromkeys([*old, *new]):
            yield from _fields(old.get(field), new.get(field), f"{name}.{field}".lstrip("."))
    elif old != new:
        yield name, old, new
