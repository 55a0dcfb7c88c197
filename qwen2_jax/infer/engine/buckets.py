# SPDX-License-Identifier: Apache-2.0
"""The few shapes that programs are compiled for, and the most tokens that a row may hold."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model import rope

SHORTEST_CACHE = 256  # slots


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that programs are compiled for.

    rows: the smallest batch; larger ones are padded to rows * 2^n. chunks: sizes of prefill chunks, ascending.
    lengths: cache lengths are SHORTEST_CACHE * 2^n up to `limit`, rounded up to a multiple of SHORTEST_CACHE.
    """

    rows: int
    chunks: tuple[int, ...]
    limit: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Buckets":
        """The shapes for the default backend."""
        chunks = (32, 128, 512) if jax.default_backend() == "cpu" else (128, 512, 2048)
        return cls(rows=1, chunks=chunks, limit=max(context_limit(config, mode) for mode in rope.MODES))

    def batch(self, rows: int) -> int:
        return self.rows * 2 ** max(0, math.ceil(math.log2(rows / self.rows)))

    def length(self, tokens: int) -> int:
        doubled = SHORTEST_CACHE * 2 ** max(0, math.ceil(math.log2(tokens / SHORTEST_CACHE)))
        return max(min(doubled, _round_up(self.limit)), _round_up(tokens))

    def cut(self, tokens: int) -> list[int]:
        """Sizes of the chunks that cover a prompt: large ones first, at most a third of the last one is padding."""
        sizes = []
        while tokens > 0:
            size = next((c for c in self.chunks if c >= tokens), self.chunks[-1])
            smaller = [c for c in self.chunks if c < size]
            if smaller and tokens <= 3 * smaller[-1] and tokens <= 0.75 * size:
                size = smaller[-1]
            sizes.append(size)
            tokens -= size
        return sizes

    def side_by_side(
        self, prompts: Sequence[Sequence[int]], rows: int, targets: Sequence[Sequence[int]] | None = None
    ) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Cuts prompts side by side: (tokens, positions, targets) int32 [rows, T], positions -1 beyond a row's end."""
        start = 0
        for size in self.cut(max(map(len, prompts))):
            tokens_BT, targets_BT = np.zeros((rows, size), np.int32), np.zeros((rows, size), np.int32)
            positions_BT = np.full((rows, size), -1, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + size]
                tokens_BT[row, : len(part)] = part
                positions_BT[row, : len(part)] = np.arange(start, start + len(part))
                if targets is not None:
                    targets_BT[row, : len(part)] = targets[row][start : start + size]
            yield tokens_BT, positions_BT, targets_BT
            start += size

    def __str__(self) -> str:
        lengths: list[int] = []
        while not lengths or lengths[-1] < self.limit:
            lengths.append(self.length((lengths[-1] if lengths else 0) + 1))
        rows = ", ".join(str(self.rows * 2**n) for n in range(4))
        return (
            f"rows {rows}, ...; prefill chunks {', '.join(map(str, self.chunks))}; cache {', '.join(map(str, lengths))}"
        )


def context_limit(config: ModelConfig, long_context: rope.LongContext) -> int:
    """The most tokens, prompt and answer together, that a row may hold.

    "off": max_position_embeddings. Otherwise the largest of max_position_embeddings, factor * original length where
    the config has YaRN, and 4 * trained length (Qwen2: 131072, what its authors evaluated Dual Chunk Attention to).
    """
    limit = config.max_position_embeddings
    if long_context == "off":
        return limit
    if config.rope_scaling is not None and config.rope_scaling.type == "yarn":
        scaling = config.rope_scaling
        limit = max(limit, int(scaling.factor * (scaling.original_max_position_embeddings or limit)))
    return max(limit, 4 * config.trained_length)


def _round_up(tokens: int) -> int:
    return -(-tokens // SHORTEST_CACHE) * SHORTEST_CACHE
