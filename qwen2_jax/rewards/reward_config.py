# SPDX-License-Identifier: Apache-2.0
"""Configuration of a reward: the function, its weight, its limits."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from qwen2_jax import validate
from qwen2_jax.errors import UserError

BUILTINS = ("number", "maths", "format", "length", "code")  # functions of builtin.py
BY_PATH = "<run_path>"  # __module__ of functions in config files, which runpy loads


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A reward function and how it is called. call.py documents its arguments and result."""

    function: Any  # "number", "file.py:name", "package.module:name", or the function itself
    weight: float = 1.0  # of its scores in the sum
    name: str | None = None  # in metrics and messages; None: the function's name
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # extra keyword arguments of every call
    batch: int | None = None  # completions per call, calls run in parallel; None: all in one call
    timeout: float = 60.0  # time limit of a call, seconds
    on_error: Literal["stop", "skip"] = "stop"  # a failed call stops the run, or its completions get no score

    def __post_init__(self):
        if isinstance(self.function, str):
            if self.function not in BUILTINS and not all(self.function.rpartition(":")):
                raise UserError(
                    f"reward function {validate.short(self.function)}: give one of {', '.join(BUILTINS)}, or "
                    '"path/to/file.py:name", or "package.module:name"'
                )
        elif not callable(self.function):
            raise UserError(
                f"reward function {validate.short(self.function)} is neither a function nor the name of one"
            )
        where = f"reward {self.title}"
        validate.number(self, where, ("weight",), float)
        validate.number(self, where, ("timeout",), float, 0.0)
        validate.number(self, where, ("batch",), int, 1, none=True)
        validate.choice(f"{where}: on_error", self.on_error, ("stop", "skip"))

    @property
    def title(self) -> str:
        """The reward's name in metrics and messages."""
        named = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "function")
        return self.name or named.rpartition(":")[2]

    @property
    def reference(self) -> str | None:
        """The string by which another process imports the function, as for `function`. None: not importable.

        Functions at the top level of a module or config file are importable. Lambdas, nested functions, objects and
        functions of a script or notebook (`__main__`) are not.
        """
        if isinstance(self.function, str):
            return self.function
        module, name = getattr(self.function, "__module__", None), getattr(self.function, "__qualname__", "<none>")
        if module == BY_PATH and name.isidentifier():
            return f"{Path(self.function.__code__.co_filename).resolve()}:{name}"
        known = sys.modules.get(module) if module and module != "__main__" else None
        found = known is not None and known.__spec__ is not None and getattr(known, name, None) is self.function
        return f"{module}:{name}" if found else None


Function = Callable[..., Any]
