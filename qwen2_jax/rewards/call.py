# SPDX-License-Identifier: Apache-2.0
"""Loading a reward function, calling it and checking what it returns: the same in a worker as in this process.

A reward function is any Python callable

    f(prompts, completions, **columns) -> list[float | None]

called with keywords. prompts: message lists, completions: texts, columns: the data's other fields (answer, ...) and
completion_ids, each a list with one value per completion. The reward's `options` are keywords, too. A function that
names only some of them gets only those. It returns one number per completion, and None where it does not apply.
"""

import importlib
import inspect
import math
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.rewards.reward_config import BUILTINS, Function


class Failed(Exception):
    """A call gave nothing usable; the message is the reason."""


def load(reference: str) -> Function:
    """The function at "name of a built-in", "file.py:name" or "package.module:name".

    Raises UserError when there is none, or when the file or module cannot be executed.
    """
    place, _, name = (f"qwen2_jax.rewards.builtin:{reference}" if reference in BUILTINS else reference).rpartition(":")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UserError(f"reward function {reference}: no file {str(Path(place).absolute())!r}")
    try:
        if is_file:
            sys.path.insert(0, str(Path(place).absolute().parent))  # as for a script: it may import its neighbours
            found = runpy.run_path(place).get(name)
        else:
            found = getattr(importlib.import_module(place), name, None)
    except (Exception, SystemExit) as why:  # somebody else's file: anything may happen in it
        raise UserError(f"reward function {reference} cannot be loaded: {told(why)}") from why
    if not callable(found):
        raise UserError(f"reward function {reference}: {place} defines no function {name!r}")
    return found


def call(function: Function, columns: dict[str, Any], options: dict[str, Any]) -> tuple[list[float | None], list[str]]:
    """Calls once. Returns scores, and for each an empty text or what is wrong with it (the score is None then).

    columns: "prompts", "completions" and the data's, of equal length. Raises Failed, and UserError where the function
    does: it means a mistake of the set-up, which no other completion would be spared.
    """
    count = len(columns["completions"])
    try:
        given = _accepted(function, columns | options)
        returned = function(**given)
        values = None if isinstance(returned, str | bytes | dict) or not isinstance(returned, Iterable) else [*returned]
    except UserError:
        raise
    except (Exception, SystemExit) as why:  # somebody else's function: whatever it raises is the reason
        raise Failed(told(why)) from why
    if values is None:
        raise Failed(f"it returned {validate.short(returned)}, not a list of {count} numbers")
    if len(values) != count:
        raise Failed(f"it returned {len(values)} values for {count} completions")
    checked = [_score(value) for value in values]
    return [score for score, _ in checked], [wrong for _, wrong in checked]


def told(why: BaseException) -> str:
    """An exception in one line, as the last line of a traceback, and the place it comes from."""
    last = " ".join("".join(traceback.format_exception_only(why)).split())
    frames = traceback.extract_tb(why.__traceback__)
    return f"{last} ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else last


def _accepted(function: Function, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the function takes. Raises UserError where it needs one that is not there."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {p.name for p in parameters if p.name in names and p.default is p.empty}
    if missing := sorted(needed - given.keys()):
        raise UserError(
            f"reward function {getattr(function, '__name__', 'given')} needs {', '.join(missing)}, which the data does "
            f"not have: it can have {', '.join(given)}. Name the field as the data does, or give the argument a default"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return given if takes_all else {name: given[name] for name in names if name in given}


def _score(value: Any) -> tuple[float | None, str]:
    if value is None:
        return None, ""
    try:
        score = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        score = None
    if score is None or not math.isfinite(score):
        return None, f"it returned {validate.short(value)}, which is not a finite number"
    return score, ""
