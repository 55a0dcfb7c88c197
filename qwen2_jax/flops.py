# SPDX-License-Identifier: Apache-2.0
"""What a model costs, as exact formulas of its config: parameters, bytes of weights and cache, operations per token."""

from .config import FULL, ModelConfig


def parameters(config: ModelConfig) -> int:
    """All parameters of the model; a tied head counts once."""
    return _count(config, config.num_experts)


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token meets: the chosen experts only, and both embeddings."""
    return _count(config, config.num_experts_per_tok)


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the token embedding and, where it is not tied, the head."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes one cached token takes in all layers: keys and values of every kv head. itemsize: bytes per number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def forward_flops(config: ModelConfig, length: int) -> int:
    """Floating point operations of one forward pass over `length` tokens of one sequence, logits of all positions.

    A multiply-add counts as two. Counted are the matrix products and causal attention (half the square, or a band of
    the window's width); norms, rotary embedding and softmax are left out. A training step takes three times as much.
    """
    L, D = config.num_hidden_layers, config.hidden_size
    matrices = active_parameters(config) - embedding_parameters(config) - D * (2 * L + 1) - L * _biases(config)
    head = config.vocab_size * D  # the embedding is a lookup
    pairs = sum(_visible_pairs(length, window) for window in config.windows)
    return 2 * length * (matrices + head) + 4 * pairs * config.num_attention_heads * config.head_dim


def _visible_pairs(length: int, window: int) -> int:
    """Pairs (query, key) with key <= query and query - key < window."""
    if window == FULL or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _biases(config: ModelConfig) -> int:
    """Bias parameters of one layer: those of the query, key and value projections."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * config.head_dim if config.qkv_bias else 0


def _count(config: ModelConfig, experts: int) -> int:
    D, H = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
    attention = D * (2 * queries + 2 * keys) + _biases(config)
    dense = 3 * D * config.intermediate_size
    router = D * config.num_experts + D  # and the shared expert's gate
    sparse = router + 3 * D * (experts * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    mlps = sum(sparse if config.is_sparse(i) else dense for i in range(config.num_hidden_layers))
    return embedding_parameters(config) + D + config.num_hidden_layers * (attention + 2 * D) + mlps
