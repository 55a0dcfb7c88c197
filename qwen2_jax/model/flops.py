# SPDX-License-Identifier: Apache-2.0
"""Exact formulas of a config: parameters, bytes of weights and cache, floating point operations per token."""

from collections.abc import Iterable

import numpy as np

from qwen2_jax.config.model_config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """All parameters of the model; a tied head counts once."""
    return _count(config, config.num_experts)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses: the chosen experts only, and both embeddings."""
    return _count(config, config.num_experts_per_tok)


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the token embedding and, where there is one that is not tied, the LM head."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings or config.scores else 2)


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes one cached token takes in all layers: keys and values of every kv head. itemsize: bytes per number; with
    int8, 1, each head has a scale of four bytes as well.
    """
    head = config.head_dim * itemsize + (4 if itemsize == 1 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


def forward_flops(config: ModelConfig, length: int) -> int:
    """Floating point operations of one forward pass over `length` tokens of one sequence, logits of all positions.

    A multiply-add counts as two. Counted are the matrix products and causal attention (half the square, or a band of
    the window's width); norms, rotary embedding and softmax are left out.
    """
    return 2 * length * matrix_parameters(config) + attention_flops(config, (length,))


def train_flops(config: ModelConfig, lengths: Iterable[int], *, frozen: bool = False) -> int:
    """Floating point operations that a training step over documents of these lengths needs, packed or not.

    The backward pass takes twice the forward pass: one product for the gradient of each operand. frozen: the matrices
    are not trained (adapters are), so half of that, their gradient, is not needed. Padding and what rematerialisation
    computes a second time are not counted: an MFU computed from this is comparable between runs. docs/metrics.md has
    the formula.
    """
    lengths = np.asarray(lengths, np.int64)
    passes = 4 if frozen else 6
    return passes * int(lengths.sum()) * matrix_parameters(config) + 3 * attention_flops(config, lengths)


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters of the matrices that a token is multiplied with; the embedding is a lookup, the head is one of them,
    also where they are the same array, and a reward model's too."""
    L, D = config.num_hidden_layers, config.hidden_size
    outside = embedding_parameters(config) + D + sum(_score_head(config))
    layers = active_parameters(config) - outside - L * (2 * D + _biases(config))
    return layers + head_parameters(config)


def head_parameters(config: ModelConfig) -> int:
    """Those of `matrix_parameters` in the head: the LM head, tied or not, or a reward model's."""
    return _score_head(config)[0] if config.scores else config.vocab_size * config.hidden_size


def expert_parameters(config: ModelConfig) -> int:
    """Those of `matrix_parameters` that are in routed experts; 0 for a dense model."""
    layers = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    return layers * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size if layers else 0


def attention_flops(config: ModelConfig, lengths: Iterable[int]) -> int:
    """Operations of one forward pass of attention over documents of these lengths, all layers.

    For every visible pair, query times key and probability times value.
    """
    lengths = np.asarray(lengths, np.int64)
    pairs = {window: _visible_pairs(lengths, window) for window in set(config.windows)}
    return 4 * config.num_attention_heads * config.head_dim * sum(pairs[window] for window in config.windows)


def segment_lengths(segments_BT) -> np.ndarray:
    """Tokens of each document in packed rows [..., T]: runs of equal segment ids, padding (negative) left out."""
    rows_BT = np.asarray(segments_BT)
    rows_BT = rows_BT.reshape(-1, rows_BT.shape[-1])
    starts_BT = np.ones(rows_BT.shape, bool)
    starts_BT[:, 1:] = rows_BT[:, 1:] != rows_BT[:, :-1]
    starts = np.flatnonzero(starts_BT)
    lengths = np.diff(starts, append=rows_BT.size)
    return lengths[rows_BT.reshape(-1)[starts] >= 0]


def _visible_pairs(lengths: np.ndarray, window: int) -> int:
    """Pairs (query, key) of one document with key <= query and query - key < window, summed over documents."""
    near = np.minimum(lengths, window)  # queries that see everything before them; the others see `window` keys each
    return int((near * (near + 1) // 2 + (lengths - near) * near).sum())


def _biases(config: ModelConfig) -> int:
    """Bias parameters of one layer: those of the query, key and value projections."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * config.head_dim if config.qkv_bias else 0


def _score_head(config: ModelConfig) -> tuple[int, int]:
    """Parameters of a reward model's head: those of its matrices, its biases."""
    D = config.hidden_size
    return {None: (0, 0), "linear": (D, 0), "two_layers": (D * D + D, D + 1)}[config.score_head]


def _count(config: ModelConfig, experts: int) -> int:
    D, H = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
    attention = D * (2 * queries + 2 * keys) + _biases(config)
    dense = 3 * D * config.intermediate_size
    router = D * config.num_experts + D  # and the shared expert's gate
    sparse = router + 3 * D * (experts * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    mlps = sum(sparse if config.is_sparse(i) else dense for i in range(config.num_hidden_layers))
    outside = embedding_parameters(config) + D + sum(_score_head(config))
    return outside + config.num_hidden_layers * (attention + 2 * D) + mlps
