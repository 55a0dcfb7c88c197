# SPDX-License-Identifier: Apache-2.0
"""The kinds of prompt that LM takes, and checks of their form. Errors are UserError."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen2_jax import validate
from qwen2_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages
Tools = Sequence[Any]  # as Tokenizer.render_chat takes them
Conversation = Sequence[int] | Messages  # as a reward model scores it


def is_messages(given: Any) -> bool:
    """Whether a prompt is a conversation: a list that begins with a dict."""
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def token_ids(prompt: Any) -> list[int]:
    """The ids of a prompt that is a list or an array of integers."""
    try:
        ids = np.asarray(prompt)
    except (ValueError, OverflowError):  # lists of different lengths, or nested too deep
        ids = np.zeros(0)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"a prompt must be text or a list of token ids, not empty; given {validate.short(prompt)}")
    return ids.tolist()


def listed(rows: Any, what: str) -> list:
    """The prompts of a call of LM's method `what`."""
    if isinstance(rows, str | Mapping) or not hasattr(rows, "__len__") or not len(rows):
        raise UserError(f"{what} needs a list, not empty, of prompts; given {validate.short(rows)}")
    if isinstance(rows[0], int | np.integer):
        raise UserError(
            f"{what} needs a list of prompts; for one prompt of token ids put it in a list: [[{rows[0]}, ...]]"
        )
    return list(rows)


def one_seed_each(seed: int | Sequence[int] | None, prompts: Sequence) -> list:
    """A seed, or None, for each prompt."""
    if seed is None or not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
        return [seed] * len(prompts)
    if len(seed) != len(prompts):
        raise UserError(f"{len(seed)} seeds for {len(prompts)} prompts; give one seed, or one per prompt")
    return [*seed]
