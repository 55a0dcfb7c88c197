# SPDX-License-Identifier: Apache-2.0
"""Tiny models with every kind of layer that meets a kernel, and what they compute: for tests and benchmarks/device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tiny
from qwen2_jax import model
from qwen2_jax.config import DualChunk, ModelConfig
from qwen2_jax.model import rope
from qwen2_jax.model.kv_cache import Cache

DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
MOE = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
KINDS = {  # of layers that meet a kernel; the dense model's are the first layer of "sliding" and the attention of "moe"
    "sliding": dataclasses.replace(DENSE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "moe": dataclasses.replace(DENSE, **MOE),
    "dual chunk": dataclasses.replace(
        DENSE, dual_chunk_attention_config=DualChunk(chunk_size=48, local_size=8, original_max_position_embeddings=0)
    ),
}
B, T, SLOTS = 2, 70, 128


def results(kind, dtype, implementation):
    """(logits of a packed batch, gradients of its loss, logits of a prefill and of one decoding step)."""
    config = KINDS[kind]
    graphdef, _ = model.declare(config, dtype=dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(dtype), tiny.random_params(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (B, T)))
    document = jnp.arange(T) >= T // 3
    turns = rope.choose(config, [T + 1] * B, "dca" if kind == "dual chunk" else "off")
    if kind != "dual chunk":
        turns = dataclasses.replace(turns, chunk_len_B=None)
    positions = jnp.broadcast_to(jnp.where(document, jnp.arange(T) - T // 3, jnp.arange(T)), (B, T))
    segments = jnp.broadcast_to(document.astype(jnp.int32), (B, T))
    common = {"rope": turns, "implementation": implementation}

    @jax.jit
    def packed(params):
        def loss(params):
            qwen2 = nnx.merge(graphdef, params)
            logits = qwen2.logits(qwen2(tokens, positions_BT=positions, segments_BT=segments, **common).hidden_BTD)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
            return -picked.mean(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return logits, gradients

    @jax.jit
    def answered(params):
        qwen2 = nnx.merge(graphdef, params)
        at = jnp.stack([jnp.arange(T), jnp.where(jnp.arange(T) < 11, jnp.arange(T), -1)])
        context = jnp.array([T + 1, 12])
        out = qwen2(tokens, positions_BT=at, cache=Cache.zeros(config, B, SLOTS, dtype), context_B=context, **common)
        last = at.max(axis=1)[:, None] + 1
        step = qwen2(tokens[:, :1], positions_BT=last, cache=out.cache, context_B=context, **common)
        seen = jnp.where(at[..., None] >= 0, qwen2.logits(out.hidden_BTD), 0)
        return seen, qwen2.logits(step.hidden_BTD)

    return *packed(params), *answered(params)
