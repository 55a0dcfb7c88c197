# SPDX-License-Identifier: Apache-2.0
"""Reward functions: any Python function that scores completions, run in separate worker processes.

    def brief(prompts, completions, answer, **columns):  # in rewards.py
        return [1.0 if right in text.split() else 0.0 for text, right in zip(completions, answer)]

    with Scorer([RewardFunction(function="rewards.py:brief", weight=0.5), RewardFunction(function="number")]) as score:
        score(prompts, completions, answer=answers).totals

call.py defines the interface, scorer.py adds up rewards, builtin.py has ready-made functions.
"""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.rewards.reward_config import RewardFunction
    from qwen2_jax.rewards.scorer import Scorer, Scores
    from qwen2_jax.rewards.shaping import shaped, weighted

__all__ = ["RewardFunction", "Scorer", "Scores", "shaped", "weighted"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.rewards.scorer": ["Scorer", "Scores"],
        "qwen2_jax.rewards.shaping": ["shaped", "weighted"],
        "qwen2_jax.rewards.reward_config": ["RewardFunction"],
    },
)
