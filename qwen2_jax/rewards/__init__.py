# SPDX-License-Identifier: Apache-2.0
"""Reward functions: how good an answer is, by any Python function, run where it can do no harm to the training.

    def brief(prompts, completions, answer, **columns):  # in rewards.py
        return [1.0 if right in text.split() else 0.0 for text, right in zip(completions, answer)]

    with Scorer([Reward(function="rewards.py:brief"), Reward(function="format", weight=0.2, options=...)]) as score:
        score(prompts, completions, answer=answers).totals

call.py has the interface, score.py the sums, builtin.py what is ready to use.
"""

from .score import Scorer, Scores
from .shaping import shaped, weighted
from .spec import Reward

__all__ = ["Reward", "Scorer", "Scores", "shaped", "weighted"]
