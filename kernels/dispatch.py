# SPDX-License-Identifier: Apache-2.0
"""Choosing an implementation by name.

Every operation keeps a table `{name: function}`, fastest first. `implementation=None` takes the first that supports the
inputs on the current device; a named implementation runs or raises its error: it is never replaced by another.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .target import OtherPlatform, require, target

Table = Mapping[str, Callable[..., Any]]
_reported: set[tuple[str, str, str]] = set()


def late(module: str, function: str, platform: str | None = None) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call; raises OtherPlatform on platforms other than the one given.

    Importing Pallas takes half a second, which is saved on machines that do not use it.
    """

    def run(*args, **kwargs):
        if platform is not None:
            require(platform)
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return run


def dispatch(
    operation: str,
    table: Table,
    implementation: str | None,
    *args: Any,
    only_by_name: Table = {},  # noqa: B006 (never changed)
    **kwargs: Any,
) -> Any:
    """Calls one implementation of `table`.

    An implementation that does not support the inputs raises NotImplementedError before it computes anything ("needs a
    head width of 64 or 128, got 80"); with `implementation=None` the next one is then tried. On an accelerator the
    choice is printed once, on stderr, with the reasons why faster ones were not taken.

    `only_by_name` are implementations that `None` never takes: they have a precondition that cannot be checked while
    tracing (positions 0, 1, 2, ..., say), so the caller has to guarantee it.

    Raises:
        ValueError: the name is in neither table.
        NotImplementedError: the named implementation, or with None every one, refuses the inputs; the text says why.
    """
    if implementation is not None:
        named = {**table, **only_by_name}
        if implementation not in named:
            raise ValueError(f"implementation={implementation!r} is not one of {list(named)}; give one of them or None")
        return named[implementation](*args, **kwargs)
    refusals: dict[str, NotImplementedError] = {}
    for name, run in table.items():
        try:
            result = run(*args, **kwargs)
        except NotImplementedError as why:
            refusals[name] = why
        else:
            _report_choice(operation, name, refusals)
            return result
    raise NotImplementedError(f"no implementation of {operation} takes these inputs: {_listed(refusals)}")


def _listed(refusals: Mapping[str, NotImplementedError]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals.items())


def _report_choice(operation: str, name: str, refusals: Mapping[str, NotImplementedError]) -> None:
    on = target()
    if on.platform == "cpu" or (operation, name, on.kind) in _reported:
        return
    _reported.add((operation, name, on.kind))
    here = {name: why for name, why in refusals.items() if not isinstance(why, OtherPlatform)}
    why = f" ({_listed(here)})" if here else ""
    print(f"qwen2-jax: {operation} runs as {name!r} on {on.kind}{why}", file=sys.stderr)
