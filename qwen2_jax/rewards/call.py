# SPDX-License-Identifier: Apache-2.0
"""Loads a reward function, calls it and checks its result; used in workers and in the main process.

A reward function is any Python callable

    f(prompts, completions, **columns) -> list[float | None]

called with keyword arguments. prompts: message lists, completions: texts, columns: the data's other fields (answer,
...) and completion_ids, each a list with one value per completion. The reward's `options` are passed as keywords, too.
A function gets only the arguments it declares. It returns a number for each completion, or None for no score.
"""

import importlib
import inspect
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.rewards.reward_config import BUILTINS, Function

LARGEST = 3.4e38  # advantages are computed in float32


class Failed(Exception):
    """A call failed or returned an invalid result; the message is the reason."""


def load(reference: str) -> Function:
    """The function at "name of a built-in", "file.py:name" or "package.module:name".

    Raises UserError when there is none, or when the file or module cannot be executed.
    """
    origin, _, name = (f"qwen2_jax.rewards.builtin:{reference}" if reference in BUILTINS else reference).rpartition(":")
    is_file = origin.endswith(".py")
    if is_file and not Path(origin).is_file():
        raise UserError(f"reward function {reference}: no file {str(Path(origin).absolute())!r}")
    try:
        if is_file:
            sys.path.insert(0, str(Path(origin).absolute().parent))  # as for a script: it may import its neighbours
            found = runpy.run_path(origin).get(name)
        else:
            found = getattr(importlib.import_module(origin), name, None)
    except (Exception, SystemExit) as why:  # user code may raise anything
        raise UserError(f"reward function {reference} cannot be loaded: {described(why)}") from why
    if not callable(found):
        raise UserError(f"reward function {reference}: {origin} defines no function {name!r}")
    return found


def call(function: Function, columns: dict[str, Any], options: dict[str, Any]) -> tuple[list[float | None], list[str]]:
    """Calls the function once. Returns the scores and, for each, an empty string or an error (its score is then None).

    columns: "prompts", "completions" and the data's columns, of equal length. Raises Failed, and UserError if the
    function does, for a configuration error that affects every completion.
    """
    count = len(columns["completions"])
    try:
        given = _accepted(function, columns | options)
        returned = function(**given)
        values = None if isinstance(returned, str | bytes | dict) or not isinstance(returned, Iterable) else [*returned]
    except UserError:
        raise
    except (Exception, SystemExit) as why:  # user code may raise anything
        raise Failed(described(why)) from why
    if values is None:
        raise Failed(f"it returned {validate.short(returned)}, not a list of {count} numbers")
    if len(values) != count:
        raise Failed(f"it returned {len(values)} values for {count} completions")
    checked = [_score(value) for value in values]
    return [score for score, _ in checked], [wrong for _, wrong in checked]


def described(why: BaseException) -> str:
    """An exception in one line: the last line of its traceback, with file and line number."""
    last = " ".join("".join(traceback.format_exception_only(why)).split())
    frames = traceback.extract_tb(why.__traceback__)
    return f"{last} ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else last


def _accepted(function: Function, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that the function accepts. Raises UserError if a required one is missing."""
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
    except (TypeError, ValueError, OverflowError):
        score = None
    if score is None or not abs(score) <= LARGEST:  # NaN compares with nothing
        return None, f"it returned {validate.short(value)}, which is not a finite number of float32"
    return score, ""
