# SPDX-License-Identifier: Apache-2.0
"""Checks of values a user wrote, each raising UserError with what was given and what is allowed."""

from collections.abc import Collection, Iterable
from typing import Any

from qwen2_jax.errors import UserError

MAX_INT = 2**63 - 1
FLOAT32_MAX, FLOAT32_TINY = (2 - 2.0**-23) * 2.0**127, 2.0**-126  # the largest, and the smallest normal number


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """The value is one of a few."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise UserError(f"{name} is {short(value)}; supported: {', '.join(map(repr, allowed))}")


def known(where: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """No key is given that is not allowed."""
    if unknown := sorted(set(given) - set(allowed)):
        shown = ", ".join(map(key, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise UserError(f"{where} has unsupported {shown}; supported: {', '.join(allowed) or 'nothing'}")


def divides(name: str, value: int, by: str, divisor: int) -> None:
    """The value is a multiple of the divisor."""
    if value % divisor:
        raise UserError(f"{name} {value} is not a multiple of {by} {divisor}")


def number(
    record: Any,
    where: str,
    names: Iterable[str],
    kind: type,
    least: float | None = None,
    none: bool = False,
    *,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """The named fields of a dataclass are of type `kind` (int, float or bool) and in bounds.

    Floats are finite in float32, in which models compute; ints have at most 64 bits. least, most: bounds that are
    allowed. above: a bound that is not; above 0 means in float32 too. none: None passes. Whole numbers are replaced by
    floats where floats are meant, also in a frozen dataclass.
    """
    largest = FLOAT32_MAX if kind is float else MAX_INT
    for name in names:
        value: Any = getattr(record, name)
        if none and value is None:
            continue
        if kind is float and type(value) is int and abs(value) <= FLOAT32_MAX:
            value = float(value)
            object.__setattr__(record, name, value)
        fits: Any = type(value) is kind  # Any: mypy would take the value for a bare object from here on
        if (
            not fits
            or not abs(value) <= largest  # nor not-a-number
            or (least is not None and value < least)
            or (most is not None and value > most)
            or (above is not None and value <= max(above, FLOAT32_TINY))
        ):
            bounds = "" if least is None else f", {kind(least)} or more"
            bounds += "" if above is None else f", above {kind(above)}"
            bounds += "" if most is None else f", at most {kind(most):,}"
            finite = " and finite in float32" if fits and kind is float and not abs(value) <= largest else ""
            raise UserError(f"{where}: {name} is {short(value)}; it must be of type {kind.__name__}{finite}{bounds}")


def unicode_text(value: Any, where: str) -> str:
    """The value is text without lone surrogates, which cannot be encoded. Returns it."""
    if not isinstance(value, str):
        raise UserError(f"{where} is {short(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode ({error.reason}, character {error.start + 1})") from error
    return value


def key(name: str) -> str:
    """A key or a name of a tensor from a file, as it stands in a message of one line."""
    return name if name.isprintable() and 0 < len(name) <= 120 else short(name)


def short(value: Any) -> str:
    """repr, cut to what fits in one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
