# SPDX-License-Identifier: Apache-2.0
"""Reads untrusted JSON: a file of a checkpoint, a line of prompts or records.

What json.loads accepts and the code behind it cannot use is refused here, with the reason: deep nesting, integers of
hundreds of digits, half of a surrogate pair, bytes that are not UTF-8. Whether a number or a type suits its key is
checked where the key is read.
"""

import dataclasses
import functools
import json
import re
from typing import Any

from ..errors import UserError

MAX_DEPTH = 100  # JSON schemas of tools nest about 20 deep; the walks over values here are recursive
MAX_DIGITS = 100  # of an integer: converted to a float, 309 overflow


def parse_json(
    content: bytes | str, where: str, error: type[UserError] = UserError, *, repeated: list[str] | None = None
) -> Any:
    """The value of a JSON text.

    Args:
        content: the text; bytes are UTF-8, with or without a byte order mark.
        where: what the message begins with, such as a path or "line 3 of prompts.jsonl".
        error: the class to raise.
        repeated: receives the keys that an object gives more than once, of which the last value counts.

    Raises:
        UserError (or `error`): no JSON, no UTF-8, nested deeper than MAX_DEPTH, an integer of more than MAX_DIGITS
            digits, or a string that is no Unicode text.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        pairs = None if repeated is None else functools.partial(_object, repeated=repeated)
        long: list[_LongInteger] = []
        value = json.loads(text, parse_int=functools.partial(_integer, long=long), object_pairs_hook=pairs)
        if long or text.count("[") + text.count("{") > MAX_DEPTH or _may_hold_half_pairs(content, text):
            check_value(value)  # of most texts it is known without a look at each value
    except (ValueError, RecursionError) as why:
        raise error(f"{where} is not JSON that can be read: {' '.join(str(why).split())[:200]}") from None
    return value


def parse_json_object(content: bytes | str, where: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """As parse_json; the value must be an object."""
    value = parse_json(content, where, error)
    if not isinstance(value, dict):
        raise error(f"{where} holds a JSON {_NAMES.get(type(value), 'null')} instead of an object")
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_LEAVES = {int, float, bool, type(None)}
_NAMES = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}


def _object(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    """An object's keys and values; keys that are there already go to `repeated`."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            repeated.append(key)
        out[key] = value
    return out


@dataclasses.dataclass(frozen=True)
class _LongInteger:
    """Stands for an integer that is not read, until its key is known."""

    digits: int


def _integer(digits: str, long: list[_LongInteger]) -> int | _LongInteger:
    if len(digits) <= MAX_DIGITS:
        return int(digits)
    long.append(_LongInteger(len(digits)))
    return long[-1]


def _may_hold_half_pairs(content: bytes | str, text: str) -> bool:
    """Whether a string of the JSON text may be no Unicode text: where half of a surrogate pair is spelled or inside."""
    inside = isinstance(content, str) and not text.isascii()
    return inside or ("\\u" in text and _HALF.search(text) is not None)


def check_value(value: Any) -> None:
    """Raises ValueError where a value is nested too deep or a string, key or value, is no Unicode text."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if type(item) in _LEAVES:
                continue
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key, inner in item.items():
                    if isinstance(inner, _LongInteger):
                        raise ValueError(f"{key} is {_too_long(inner)}")
                    if isinstance(key, str):
                        _check_text(key)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, _LongInteger):
                raise ValueError(_too_long(item))
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _check_text(text: str) -> None:
    if not text.isascii():
        text.encode()  # half of a surrogate pair, which JSON can escape, is no text: UnicodeEncodeError


def _too_long(number: _LongInteger) -> str:
    return f"an integer of {number.digits} digits; at most {MAX_DIGITS} are read"
