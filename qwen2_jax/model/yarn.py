# SPDX-License-Identifier: Apache-2.0
"""YaRN (Peng et al. 2023, arXiv:2309.00071): rotary frequencies beyond the trained length. rope.py uses them."""

import math

import numpy as np

from qwen2_jax.config.model_config import ModelConfig, RopeScaling


def frequencies(
    head_dim: int,
    *,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> np.ndarray:
    """Frequencies under YaRN (sec. 3.2), float32 [H/2], radians per token.

    Dimensions with more than beta_fast rotations within original_length keep their frequency, those with fewer than
    beta_slow rotations have it divided by `factor`, and a linear ramp joins the two. factor=1 gives plain frequencies
    exactly.
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return (plain * (1 - ramp) + plain / factor * ramp).astype(np.float32)


def attention_factor(scaling: RopeScaling) -> float:
    """YaRN's factor on cos and sin: the config's, else the ratio of two mscales, else 0.1 ln(factor) + 1."""

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def scaling_for(config: ModelConfig, length: int) -> RopeScaling:
    """YaRN for rows of `length` tokens: the config's, else with the factor length / trained_length."""
    if config.rope_scaling is not None and config.rope_scaling.type == "yarn":
        return config.rope_scaling
    factor = max(1.0, length / config.trained_length)
    return RopeScaling(type="yarn", factor=factor, original_max_position_embeddings=config.trained_length)
