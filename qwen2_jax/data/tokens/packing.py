# SPDX-License-Identifier: Apache-2.0
"""Packs documents into rows: segment ids separate them, positions restart in each.

A group is a document of several sequences: a prompt with each of its ranked responses. A group is never split.
A sequence's segment is the group's number in the row times `ranks` plus its rank, 0 for the best response; `ranks` is
the largest number of sequences in any group of the data.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """One training batch; every field is an array [B, T]. Padding has segment -1, position -1 and weight 0.

    The last four are float32 values per target for stages with a reference model or a policy; None elsewhere.
    """

    tokens_BT: Any  # int32, inputs
    targets_BT: Any  # int32, the next token of the same document
    weights_BT: Any  # float32, weight of each target in the loss; 0 = not a target
    segments_BT: Any  # int32, document number within the row; of groups: group number x ranks + rank
    positions_BT: Any  # int32, position within the document; of groups: within the sequence
    reference_BT: Any = None  # log-probability under the reference
    old_BT: Any = None  # under the weights that the rows were sampled with, as training computes it
    sampled_BT: Any = None  # the same as the sampler computed it
    advantages_BT: Any = None


class TokenizedDocument(Protocol):
    """One document: its ids and, for each, whether it is a prediction target that counts."""

    @property
    def tokens(self) -> Any: ...  # list or array of int

    @property
    def is_target(self) -> Any: ...  # list or array of bool, as long

    def __len__(self) -> int: ...


def empty_row(length: int, pad: int) -> Batch:
    """A row [length] of padding."""
    return Batch(
        np.full(length, pad, np.int32),
        np.full(length, pad, np.int32),
        np.zeros(length, np.float32),
        np.full(length, -1, np.int32),
        np.full(length, -1, np.int32),
    )


def pack_row(documents: Sequence[TokenizedDocument], length: int, *, pad: int) -> Batch:
    """One row [length] from documents in order. The rest is truncated; no target crosses a document boundary."""
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


class SequenceGroup(TokenizedDocument, Protocol):
    """A document of several sequences, one after another."""

    @property
    def begins(self) -> Any: ...  # array of bool, as long: whether a sequence begins here


def pack_groups(groups: Sequence[SequenceGroup], length: int, ranks: int, *, pad: int) -> Batch:
    """One row [length] from groups that fit it, of at most `ranks` sequences each.

    Every token is an input, because a reward model computes its score at a sequence's last token, which has no target:
    its weight is 0.
    """
    row = empty_row(length, pad)
    at = 0
    for number, group in enumerate(groups):
        n = len(group)
        here = slice(at, at + n)
        rank = np.cumsum(group.begins) - 1
        follows = ~np.append(group.begins[1:], True)  # a token of the same sequence
        row.tokens_BT[here] = group.tokens
        row.targets_BT[here] = np.where(follows, np.append(group.tokens[1:], pad), pad)
        row.weights_BT[here] = follows & np.append(group.is_target[1:], False)
        row.segments_BT[here] = number * ranks + rank
        row.positions_BT[here] = np.arange(n) - np.flatnonzero(group.begins)[rank]
        at += n
    return row


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows of equal length as one batch."""
    return Batch(*(None if field[0] is None else np.stack(field) for field in zip(*rows, strict=True)))
