# SPDX-License-Identifier: Apache-2.0
"""Real shapes of dual_chunk_attention: the models that are used beyond their trained length, and their chunks.

B batch, T query length, S key length, N query heads, K kv heads, H head width; chunk_len = chunk_size - local_size.
"""

from ..flash_attention.shapes import HEADS

CHUNKS = {"32k": {"chunk_len": 32768 - 512}, "1m": {"chunk_len": 262144 - 8192}}

LENGTHS = {
    "prefill-chunk 128k": CHUNKS["32k"] | {"B": 1, "T": 2048, "S": 131072},
    "train 128k": CHUNKS["32k"] | {"B": 1, "T": 131072, "S": 131072},
    "prefill-chunk 1m": CHUNKS["1m"] | {"B": 1, "T": 8192, "S": 1010000},
}

MODELS = ("qwen2-7b", "qwen2-57b-a14b", "qwen2-72b")

SHAPES = {f"{model} {use}": lengths | HEADS[model] for model in MODELS for use, lengths in LENGTHS.items()}
