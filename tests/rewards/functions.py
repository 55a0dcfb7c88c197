# SPDX-License-Identifier: Apache-2.0
"""Reward functions that behave and that misbehave, loaded by the tests by path."""

import os
import subprocess
import sys
import time

import numpy as np


def length(completions):
    return [len(text) for text in completions]


def as_array(completions):
    return np.array([len(text) for text in completions], np.float32)


def even(completions):
    return [1.0 if len(text) % 2 == 0 else None for text in completions]


def echo(prompts, completions, answer, *, scale=1.0, **columns):
    """Tells by its number what it got."""
    assert [list(columns), len(prompts)] == [["completion_ids"], len(completions)]
    return [scale * (float(right) + len(ids)) for right, ids in zip(answer, columns["completion_ids"], strict=True)]


def needs_more(completions, ground_truth):
    return [0.0] * len(completions)


def process(completions):
    print("a function may print")
    assert sys.stdin.read() == ""
    return [os.getpid()] * len(completions)


def misbehaves(completions, scratch=None):
    """Each text says what happens."""
    scores = []
    for text in completions:
        if text == "raise":
            raise LookupError("no such\nword")
        if text == "exit":
            sys.exit(3)
        if text == "die":
            os._exit(7)
        if text == "hang":
            if scratch:
                subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(300)  # {scratch}"])
            time.sleep(300)
        if text == "count":
            return [0.0] * (len(completions) + 1)
        if text == "none":
            return None
        if text == "text":
            return "0" * len(completions)
        wrong = {"nan": float("nan"), "inf": float("-inf"), "word": "3", "list": [3], "large": 1e39, "digits": 10**400}
        scores.append(wrong.get(text, 1.0))
    return scores


def slow(completions, seconds):
    time.sleep(seconds * len(completions))
    return [seconds] * len(completions)


def together(completions):
    """Loses what is there twice, which does not show with one completion."""
    return [1.0 for _ in set(completions)]


class Judge:
    def __call__(self, completions):
        return [2.0] * len(completions)


judge = Judge()
