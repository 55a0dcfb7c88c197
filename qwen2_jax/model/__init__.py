# SPDX-License-Identifier: Apache-2.0
"""The decoder. decoder.py is read from the top; it holds `Qwen2`."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.model.decoder import Output, Qwen2, declare, init, split, unroll

__all__ = ["Output", "Qwen2", "declare", "init", "split", "unroll"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"qwen2_jax.model.decoder": ["Output", "Qwen2", "declare", "init", "split", "unroll"]}
)
