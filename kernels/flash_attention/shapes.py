# SPDX-License-Identifier: Apache-2.0
"""Real shapes of flash_attention, for tests, benchmarks and tuning: heads of each Qwen2, lengths it is used at.

B batch, T query length, S key length, N query heads, K kv heads, H head width.
"""

HEADS = {
    "qwen2-0.5b": {"N": 14, "K": 2, "H": 64},
    "qwen2-1.5b": {"N": 12, "K": 2, "H": 128},
    "qwen2-7b": {"N": 28, "K": 4, "H": 128},
    "qwen2-57b-a14b": {"N": 28, "K": 4, "H": 128},
    "qwen2-72b": {"N": 64, "K": 8, "H": 128},
    "qwen1.5-moe-a2.7b": {"N": 16, "K": 16, "H": 128},
}

LENGTHS = {
    "train": {"B": 4, "T": 4096, "S": 4096},
    "train-32k": {"B": 1, "T": 32768, "S": 32768},
    "prefill": {"B": 1, "T": 512, "S": 512},
    "prefill-chunk": {"B": 1, "T": 2048, "S": 32768},
}

SHAPES = {f"{model} {use}": lengths | heads for model, heads in HEADS.items() for use, lengths in LENGTHS.items()}
