# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on scores. None means no score: sums skip it, and a sum without scores is None."""

import math
from collections.abc import Sequence


def weighted(scores: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float | None]:
    """The weighted sum over functions, for each completion; scores[function][completion]."""
    columns = zip(*scores, strict=True)
    known = [[(w, s) for w, s in zip(weights, column, strict=True) if s is not None] for column in columns]
    return [math.fsum(w * s for w, s in terms) if terms else None for terms in known]


def shaped(model: Sequence[float | None], verifier: Sequence[float | None]) -> list[float | None]:
    """A reward model's scores combined with a verifier's verdict: sigmoid(r_model / 2) + (r_verifier - 1).

    Qwen2.5-Math (arXiv:2409.12122, eq. 3). verifier: 1 right, 0 wrong. A right answer gets a reward in (0, 1), a wrong
    one in (-1, 0), and the model orders them inside. None where either has no score.
    """
    pairs = zip(model, verifier, strict=True)  # tanh below: the exp of a sigmoid overflows
    return [None if m is None or v is None else 0.5 * (1 + math.tanh(m / 4)) + (v - 1) for m, v in pairs]
