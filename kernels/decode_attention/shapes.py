# SPDX-License-Identifier: Apache-2.0
"""Real shapes of decode_attention: one new token per row (or a few, when drafts are verified) against a cache.

B batch, T queries per row, S cache length, N query heads, K kv heads, H head width.
"""

from ..flash_attention.shapes import HEADS

LENGTHS = {
    "one 1k": {"B": 1, "T": 1, "S": 1024},
    "one 32k": {"B": 1, "T": 1, "S": 32768},
    "one 128k": {"B": 1, "T": 1, "S": 131072},
    "batch 4k": {"B": 64, "T": 1, "S": 4096},
    "verify 4k": {"B": 8, "T": 8, "S": 4096},
}

SHAPES = {f"{model} {use}": lengths | heads for model, heads in HEADS.items() for use, lengths in LENGTHS.items()}
