# SPDX-License-Identifier: Apache-2.0
"""The configuration of a model: `ModelConfig` with Hugging Face's names, and `PRESETS`."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.config.layer_scans import LayerScan
    from qwen2_jax.config.model_config import DTYPES, FULL, HUB_IDS, PRESETS, DualChunk, ModelConfig, RopeScaling

__all__ = ["DTYPES", "FULL", "HUB_IDS", "PRESETS", "DualChunk", "LayerScan", "ModelConfig", "RopeScaling"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.config.model_config": [
            "DTYPES",
            "DualChunk",
            "FULL",
            "HUB_IDS",
            "ModelConfig",
            "PRESETS",
            "RopeScaling",
        ],
        "qwen2_jax.config.layer_scans": ["LayerScan"],
    },
)
