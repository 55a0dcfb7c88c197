# SPDX-License-Identifier: Apache-2.0
"""A batch that is being decoded: its state on the device, and the calls of the decode loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen2_jax.model.kv_cache import Cache

# B rows  S cache slots  V vocabulary
STEPS = 16  # most tokens per row and call of the decode loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch between two calls of the decode loop. Donated to each call.

    token_B: the next token to feed. position_B: its position. count_B: tokens sampled so far. done_B: bool.
    seen_BV: bool, ids in prompt and answer, for the repetition penalty; None where no row has one.
    tokens_BS: int32, prompt and answer by position, for constraints on them; None where no row has one.
    """

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None
    tokens_BS: jax.Array | None = None


class DecodeBatch:
    """A prefilled batch. `finished`: bool [requests]."""

    def __init__(self, decode: Callable[..., Any], requests: int, state: DecodeState):
        """decode: of (state, cancel_B, steps), as Generator._decode_steps. requests: the first rows."""
        self._decode, self._state = decode, state
        self.finished = np.zeros(requests, bool)

    def advance(self, steps: int = STEPS, cancel: Sequence[int] = ()) -> list[list[tuple[int, float]]]:
        """Makes up to `steps` more tokens for every unfinished row; `cancel` ends those rows first.

        Returns the new (token, logprob) pairs of each request. Clips `steps` to STEPS.
        """
        count = len(self.finished)
        cancel_B = np.zeros(self._state.token_B.shape, bool)
        cancel_B[list(cancel)] = True
        self._state, *out = self._decode(self._state, cancel_B, np.int32(min(steps, STEPS)))
        tokens, logprobs = jax.device_get(out)
        self.finished = np.array(self._state.done_B)[:count]  # a copy: the next call reuses the array's memory
        by_row = zip(tokens.T, logprobs.T, tokens.T >= 0, strict=True)
        return [list(zip(t[made].tolist(), p[made].tolist(), strict=True)) for t, p, made in by_row][:count]
