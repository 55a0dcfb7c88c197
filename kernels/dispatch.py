# SPDX-License-Identifier: Apache-2.0
"""Choosing an implementation by name.

Every operation keeps a table `{name: function}`, fastest first. `implementation=None` takes the first that supports the
inputs; a name is an order: that implementation or its error, never a quiet substitute.
"""

from collections.abc import Callable, Mapping
from typing import Any


def dispatch(table: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Calls one implementation of `table`.

    An implementation that cannot take the inputs says so with NotImplementedError before it computes anything
    ("needs a head width of 64 or 128, got 80"); with `implementation=None` the next one is then tried.

    Raises:
        ValueError: the name is not in the table.
        NotImplementedError: the named implementation, or with None every one, refuses the inputs; the text says why.
    """
    if implementation is not None:
        if implementation not in table:
            raise ValueError(f"implementation={implementation!r} is not one of {list(table)}; give one of them or None")
        return table[implementation](*args, **kwargs)
    reasons = []
    for name, run in table.items():
        try:
            return run(*args, **kwargs)
        except NotImplementedError as why:
            reasons.append(f"{name}: {why}")
    raise NotImplementedError("no implementation takes these inputs: " + "; ".join(reasons))
