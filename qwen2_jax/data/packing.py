# SPDX-License-Identifier: Apache-2.0
"""Packs documents into rows: segment ids keep them apart, positions start again in each."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """One training batch; every field is an array [B, T]. Padding has segment -1, position -1 and weight 0.

    The last four are what stages with a reference or a policy add to each target, float32; None elsewhere.
    """

    tokens_BT: Any  # int32, inputs
    targets_BT: Any  # int32, the next token of the same document
    weights_BT: Any  # float32, weight of each target in the loss; 0 = not a target
    segments_BT: Any  # int32, document number within the row
    positions_BT: Any  # int32, position within the document
    reference_BT: Any = None  # log-probability under the reference
    old_BT: Any = None  # under the weights that the rows were sampled with, as training computes it
    sampled_BT: Any = None  # the same as the sampler computed it
    advantages_BT: Any = None


class Tokens(Protocol):
    """One document: its ids and, for each, whether it is a prediction target that counts."""

    @property
    def tokens(self) -> Any: ...  # list or array of int

    @property
    def is_target(self) -> Any: ...  # list or array of bool, as long

    def __len__(self) -> int: ...


def empty_row(length: int, pad: int) -> Batch:
    """A row [length] of nothing but padding."""
    return Batch(
        np.full(length, pad, np.int32),
        np.full(length, pad, np.int32),
        np.zeros(length, np.float32),
        np.full(length, -1, np.int32),
        np.full(length, -1, np.int32),
    )


def pack_row(documents: Sequence[Tokens], length: int, *, pad: int) -> Batch:
    """One row [length] from documents in order. What does not fit is cut off; the loss never crosses a boundary."""
    row = empty_row(length, pad)
    at = 0
    for number, document in enumerate(documents):
        n = min(len(document) - 1, length - at)  # the last token is only ever a target
        if n <= 0:
            continue
        here = slice(at, at + n)
        row.tokens_BT[here] = document.tokens[:n]
        row.targets_BT[here] = document.tokens[1 : n + 1]
        row.weights_BT[here] = document.is_target[1 : n + 1]
        row.segments_BT[here] = number
        row.positions_BT[here] = np.arange(n)
        at += n
    return row


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows of equal length as one batch."""
    return Batch(*(None if field[0] is None else np.stack(field) for field in zip(*rows, strict=True)))
