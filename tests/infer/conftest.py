# SPDX-License-Identifier: Apache-2.0
"""A byte tokenizer and a two-layer model that answer in milliseconds."""

import pytest
from tokenizers import AddedToken, models

from qwen2_jax import tokenizer
from qwen2_jax.config import ModelConfig
from qwen2_jax.infer.lm import LM
from tiny import random_params

TINY = {
    "vocab_size": 272,  # 256 bytes, 3 special tokens, 13 of padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
}


@pytest.fixture(scope="session")
def bytes_tokenizer():
    """One token per byte, and Qwen2's special tokens 256 to 258."""
    vocabulary = {character: byte for byte, character in sorted(
        (byte, character) for character, byte in tokenizer._byte_of_character().items()
    )}  # fmt: skip
    backend = tokenizer.pipeline(models.BPE(vocab=vocabulary, merges=[]))
    names = (tokenizer.END_OF_TEXT, tokenizer.IM_START, tokenizer.IM_END)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer.Tokenizer(backend, {"eos_token": tokenizer.IM_END})


@pytest.fixture(scope="session")
def lm(bytes_tokenizer):
    config = ModelConfig(**TINY)
    weights = random_params(config, unroll=True)
    return LM(config, weights, tokenizer=bytes_tokenizer, dtype="float32", unroll=True, max_rows=4)
