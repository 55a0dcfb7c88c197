# SPDX-License-Identifier: Apache-2.0
"""Re-exports of a package that are imported when they are first used, so that importing the package imports nothing.

    __getattr__, __dir__ = lazy_exports(__name__, {"qwen2_jax.config.model_config": ["ModelConfig", "PRESETS"]})

The package imports the same names under TYPE_CHECKING, for type checkers and for readers.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, Iterable[str]], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The package's __getattr__ and __dir__.

    exports: from a module to the names of it that the package offers. modules: from a name that the package offers to
    the module that it stands for.
    """
    homes = {name: module for module, names in exports.items() for name in names}
    aliases = modules or {}

    def attribute(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        if name in aliases:
            return importlib.import_module(aliases[name])
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *aliases})

    return attribute, names
