# SPDX-License-Identifier: Apache-2.0
"""Episodes of training on sampled answers: prompts -> sampled answers -> rewards -> packed rows to train on.

An episode is a function of the state at its beginning, the seed and its number, so a run that resumes there repeats it.
A run that resumes in the middle of an episode reads the rest of it from the checkpoint.
"""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from qwen2_jax.data.tokens.packing import Batch, empty_row, stack
from qwen2_jax.data.tokens.packing_plan import best_fit
from qwen2_jax.errors import UserError

# B rows  T tokens of a row

MOST = 64  # groups in a row: sums over a row's sequences take work for each that there may be


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer. completion, logprobs: of each of its tokens, the end token included, unless truncated."""

    prompt: Sequence[int]
    completion: np.ndarray
    logprobs: np.ndarray
    advantage: float = 0.0
    truncated: bool = False
    counts: bool = True  # False: its tokens are no targets

    def __len__(self) -> int:
        """Positions that it takes in a row: the last token is only ever a target."""
        return len(self.prompt) + len(self.completion) - 1


AnswerGroup = Sequence[Answer]  # answers that lie in one row, the best first


def pack(groups: Sequence[AnswerGroup], *, rows: int, length: int, pad: int, piece: int = 1) -> Batch:
    """Rows [B, length] that hold all groups, with advantages_BT and sampled_BT; each group whole in one row.

    rows: the most that are needed, one per group. B is the smallest of rows, rows / 2, rows / 4 ... that has room and
    that `piece` divides: few programs are compiled, and short answers cost less than long ones. Raises UserError where
    rows are too few.
    """
    sizes = np.array([max(sum(map(len, group)), -(-length // MOST)) for group in groups], np.int64)
    order, edges = best_fit(sizes, length)
    needed = len(edges) - 1
    if needed > rows:
        raise UserError(
            f"the answers of a step need {needed} rows of {length} tokens, and rows={rows}: give more, or 0, which has "
            "room for the longest answers; accumulate saves memory"
        )
    while rows % 2 == 0 and rows // 2 >= needed and rows // 2 % piece == 0:
        rows //= 2
    zeros = np.zeros((rows, length), np.float32)
    batch = stack([empty_row(length, pad)] * rows)._replace(sampled_BT=zeros, advantages_BT=zeros.copy())
    ranks = max(map(len, groups), default=1)
    for row in range(needed):
        at = 0
        for number, chosen in enumerate(order[edges[row] : edges[row + 1]]):
            for rank, answer in enumerate(groups[chosen]):
                _put(batch, row, at, number * ranks + rank, answer)
                at += len(answer)
    return batch


def _put(batch: Batch, row: int, at: int, segment: int, answer: Answer) -> None:
    tokens, n, first = [*answer.prompt, *answer.completion.tolist()], len(answer), len(answer.prompt) - 1
    here, targets = (row, slice(at, at + n)), (row, slice(at + first, at + n))
    batch.tokens_BT[here], batch.targets_BT[here] = tokens[:-1], tokens[1:]
    batch.segments_BT[here], batch.positions_BT[here] = segment, np.arange(n)
    batch.weights_BT[targets] = float(answer.counts)
    batch.sampled_BT[targets], batch.advantages_BT[targets] = answer.logprobs, answer.advantage


def seeds(seed: int, episode: int, count: int) -> list[int]:
    """A seed for each answer of an episode, uint32."""
    return np.random.SeedSequence([seed, episode]).generate_state(count).tolist()


def encode(batches: Sequence[Batch]) -> str:
    """Batches as text that a checkpoint keeps."""
    file = io.BytesIO()
    arrays = {
        f"{i}/{name}": field
        for i, batch in enumerate(batches)
        for name, field in batch._asdict().items()
        if field is not None
    }
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> list[Batch]:
    """The batches of `encode`."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        fields: dict[int, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            number, _, name = key.partition("/")
            fields.setdefault(int(number), {})[name] = arrays[key]
    return [Batch(**fields[i]) for i in sorted(fields)]
