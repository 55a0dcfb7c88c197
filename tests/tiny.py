# SPDX-License-Identifier: Apache-2.0
"""Tiny model configurations that the tests share: small enough to run in milliseconds, odd enough to catch mistakes."""

import zlib

import jax.numpy as jnp
import numpy as np

from qwen2_jax import model
from qwen2_jax.config import DualChunk, ModelConfig
from qwen2_jax.weights import params

_COMMON = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SPARSE = _COMMON | {
    "model_type": "qwen2_moe",
    "tie_word_embeddings": False,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": False,
}

CONFIGS = {
    "dense": ModelConfig(**_COMMON),
    "untied": ModelConfig(**_COMMON | {"tie_word_embeddings": False}),
    "sliding": ModelConfig(
        **_COMMON | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 4}
    ),
    "dual_chunk": ModelConfig(
        **_COMMON,
        dual_chunk_attention_config=DualChunk(chunk_size=12, local_size=3, original_max_position_embeddings=0),
    ),
    "moe": ModelConfig(**_SPARSE),
    "moe_mixed": ModelConfig(**_SPARSE | {"decoder_sparse_step": 2, "num_hidden_layers": 5, "norm_topk_prob": True}),
}


def random_params(config, *, unroll=False, seed=0, dtype=np.float32):
    """Weights large enough that greedy answers are not one token repeated; equal for stacked and unrolled models.

    Made by numpy: compiling the model's own initialisation takes longer than these tests.
    """
    tree = {}
    for path, spec in params.leaves(model.declare(config, unroll=unroll)[1]):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        rows = []
        for layer in spec.layers or (0,):
            rng = np.random.default_rng([seed, layer, zlib.crc32(spec.hf.encode())])
            shape = spec.shape[1:] if spec.layers else spec.shape
            rows.append(rng.normal(size=shape) * 0.3 if spec.decay or "bias" in spec.hf else np.ones(shape))
        node[path[-1]] = jnp.asarray(np.stack(rows) if spec.layers else rows[0], dtype)
    return tree
