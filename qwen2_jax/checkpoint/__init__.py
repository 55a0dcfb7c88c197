# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: from a name to a folder, from a folder to sharded arrays, and back without losing a bit."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.checkpoint.api import convert, load_params, model_bytes, open_checkpoint, save_hf, save_orbax, verify
    from qwen2_jax.checkpoint.gptq.write import write_gptq
    from qwen2_jax.checkpoint.sources import Source, locate, read_config
    from qwen2_jax.errors import CheckpointError

__all__ = [
    "CheckpointError", "Source", "convert", "load_params", "locate", "model_bytes", "open_checkpoint",
    "read_config", "save_hf", "save_orbax", "verify", "write_gptq",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.checkpoint.sources": ["Source", "locate", "read_config"],
        "qwen2_jax.checkpoint.api": [
            "convert",
            "load_params",
            "model_bytes",
            "open_checkpoint",
            "save_hf",
            "save_orbax",
            "verify",
        ],
        "qwen2_jax.checkpoint.gptq.write": ["write_gptq"],
        "qwen2_jax.errors": ["CheckpointError"],
    },
)
