# SPDX-License-Identifier: Apache-2.0
"""Checks of values a user wrote, each raising UserError with what was given and what is allowed."""

import math
from collections.abc import Collection, Iterable
from typing import Any

from qwen2_jax.errors import UserError


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """The value is one of a few."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise UserError(f"{name} is {short(value)}; supported: {', '.join(map(repr, allowed))}")


def known(where: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """No key is given that is not allowed."""
    if unknown := sorted(set(given) - set(allowed)):
        raise UserError(f"{where} has unsupported {', '.join(unknown)}; supported: {', '.join(allowed) or 'nothing'}")


def divides(name: str, value: int, by: str, divisor: int) -> None:
    """The value is a multiple of the divisor."""
    if value % divisor:
        raise UserError(f"{name} {value} is not a multiple of {by} {divisor}")


def number(
    record: Any, where: str, names: Iterable[str], kind: type, least: float | None = None, none: bool = False
) -> None:
    """The named fields of a dataclass are of type `kind` (int, float or bool), finite and at least `least`.

    none: None passes too. Whole numbers are replaced by floats where floats are meant, also in a frozen dataclass.
    """
    for name in names:
        value: Any = getattr(record, name)
        if none and value is None:
            continue
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(record, name, value)
        fits: Any = type(value) is kind  # Any: mypy would take the value for a bare object from here on
        if not fits or (least is not None and not least <= value < math.inf):
            bound = "" if least is None else f", {kind(least)} or more"
            raise UserError(f"{where}: {name} is {short(value)}; it must be of type {kind.__name__}{bound}")


def short(value: Any) -> str:
    """repr, cut to what fits in one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
