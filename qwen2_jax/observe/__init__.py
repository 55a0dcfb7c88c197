# SPDX-License-Identifier: Apache-2.0
"""Metrics, time accounting (goodput), memory use and profiles of a training run. See docs/metrics.md."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.observe.config import Logging
    from qwen2_jax.observe.goodput import Goodput
    from qwen2_jax.observe.memory_use import memory
    from qwen2_jax.observe.recorder import Recorder

__all__ = ["Goodput", "Logging", "Recorder", "memory"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.observe.config": ["Logging"],
        "qwen2_jax.observe.goodput": ["Goodput"],
        "qwen2_jax.observe.memory_use": ["memory"],
        "qwen2_jax.observe.recorder": ["Recorder"],
    },
)
