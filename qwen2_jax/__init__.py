# SPDX-License-Identifier: Apache-2.0
"""Qwen2 in JAX.

    lm = qwen2_jax.load("qwen2-0.5b")
    lm.generate(["Once upon"], max_new_tokens=32)[0].text

Names are imported when they are first used, so `import qwen2_jax` alone imports nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2_jax.config import HUB_IDS, PRESETS, ModelConfig
    from qwen2_jax.errors import UserError
    from qwen2_jax.infer.answer import Generation
    from qwen2_jax.infer.lm import LM, load

__all__ = ["HUB_IDS", "LM", "PRESETS", "Generation", "ModelConfig", "UserError", "load"]
__version__ = "0.1.0"

_HOMES = {
    "HUB_IDS": "config",
    "PRESETS": "config",
    "ModelConfig": "config",
    "UserError": "errors",
    "Generation": "infer.answer",
    "LM": "infer.lm",
    "load": "infer.lm",
}
_MODULES = ("checkpoint", "config", "model", "rope", "sharding", "tokenizer")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"qwen2_jax.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"qwen2_jax.{name}")
    raise AttributeError(f"module 'qwen2_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
