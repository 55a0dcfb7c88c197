# SPDX-License-Identifier: Apache-2.0
"""Runs Python programs that a model wrote, isolated by Linux namespaces."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.rewards.sandbox.execute import Limits, passes, run

__all__ = ["Limits", "passes", "run"]

__getattr__, __dir__ = lazy_exports(__name__, {"qwen2_jax.rewards.sandbox.execute": ["Limits", "passes", "run"]})
