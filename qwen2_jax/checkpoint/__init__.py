# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: from a name to a folder, from a folder to sharded arrays, and back without losing a bit."""

from qwen2_jax.checkpoint.places import Source, locate, read_config
from qwen2_jax.checkpoint.store import (
    convert,
    load_params,
    model_bytes,
    open_checkpoint,
    save_hf,
    save_orbax,
    verify,
)
from qwen2_jax.checkpoint.tensorfile import CheckpointError

__all__ = [
    "CheckpointError",
    "Source",
    "convert",
    "load_params",
    "locate",
    "model_bytes",
    "open_checkpoint",
    "read_config",
    "save_hf",
    "save_orbax",
    "verify",
]
