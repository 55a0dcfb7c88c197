# SPDX-License-Identifier: Apache-2.0
"""The constraints of a generation_config.json (sampling_params.Constraints) as masks over logits, on the device.

A batch in which no row has any is traced without this file; one without n-grams and sequences of ids, without the
history. Barred ids get -inf, between the repetition penalty and the temperature, as in transformers.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.infer.engine.sampling_params import MAX_EOS_IDS, MAX_INT, SamplingParams

# B rows  S slots of the cache, which are positions of the history  V vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryArrays:
    """The constraints that are compared with the tokens so far.

    ngram_B: int32, 0 is off. words: int32 [B, number, longest], sequences of two ids and more, -1 before each.
    """

    ngram_B: jax.Array
    words: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstraintArrays:
    """The constraints of each row.

    earliest_BV: int32, how many tokens an answer has before this id may follow; MAX_INT is never.
    forced_ids: int32 [B, MAX_EOS_IDS], the ids of which one is the row's last allowed token, padded with -1.
    history: None where no row needs it.
    """

    earliest_BV: jax.Array
    forced_ids: jax.Array
    history: HistoryArrays | None

    @classmethod
    def stacked(cls, rows: Sequence[SamplingParams], vocabulary: int) -> "ConstraintArrays | None":
        """One row for each request, as numpy arrays; None where no row has any constraint.

        vocabulary: V, the width of the logits. Ids beyond it are left out: they are never sampled.
        """
        if not any(row.constraints.on_logits for row in rows):
            return None
        earliest_BV = np.zeros((len(rows), vocabulary), np.int32)
        forced_ids = np.full((len(rows), MAX_EOS_IDS), -1, np.int32)

        def bar(row: int, ids: Sequence[int], count: int) -> None:
            known = [id for id in ids if id < vocabulary]
            earliest_BV[row, known] = np.maximum(earliest_BV[row, known], count)

        for row, params in enumerate(rows):
            given = params.constraints
            bar(row, params.eos_ids, given.min_new_tokens)
            bar(row, given.begin_suppress_tokens, 1)
            bar(row, [*given.suppress_tokens, *(word[0] for word in given.bad_words if len(word) == 1)], MAX_INT)
            forced_ids[row, : len(given.forced_eos_ids)] = given.forced_eos_ids
        history = _history(rows) if any(row.constraints.on_history for row in rows) else None
        return cls(cast(jax.Array, earliest_BV), cast(jax.Array, forced_ids), history)

    def apply(
        self,
        scores_BV: jax.Array,
        count_B: jax.Array,
        limit_B: jax.Array,
        position_B: jax.Array,
        tokens_BS: jax.Array | None,
    ) -> jax.Array:
        """The scores, -inf where a constraint bars the id.

        count_B: tokens of the answer so far. limit_B: most of them. tokens_BS: prompt and answer by position, read up
        to position_B, that of the newest; None without history.
        """
        barred_BV = count_B[:, None] < self.earliest_BV
        if self.history is not None:
            assert tokens_BS is not None
            barred_BV = _bar_ngrams(barred_BV, self.history.ngram_B, position_B, tokens_BS)
            barred_BV = _bar_words(barred_BV, self.history.words, position_B, tokens_BS)
        scores_BV = jnp.where(barred_BV, -jnp.inf, scores_BV)
        last_B1 = ((count_B + 1 == limit_B) & (self.forced_ids[:, 0] >= 0))[:, None]
        forced_BV = jnp.any(jnp.arange(scores_BV.shape[-1])[None, :, None] == self.forced_ids[:, None], axis=-1)
        return jnp.where(last_B1, jnp.where(forced_BV, 0.0, -jnp.inf), scores_BV)


def _history(rows: Sequence[SamplingParams]) -> HistoryArrays:
    words = [[word for word in row.constraints.bad_words if len(word) > 1] for row in rows]
    # Powers of two: rows of other checkpoints' constraints seldom need another program.
    number = _power_of_two(max(map(len, words)))
    longest = _power_of_two(max((len(word) for row in words for word in row), default=2))
    padded = np.full((len(rows), number, longest), -1, np.int32)
    for row, some in enumerate(words):
        for n, word in enumerate(some):
            padded[row, n, -len(word) :] = word
    ngram_B = np.asarray([row.constraints.no_repeat_ngram_size for row in rows], np.int32)
    return HistoryArrays(cast(jax.Array, ngram_B), cast(jax.Array, padded))


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _bar_ngrams(barred_BV, ngram_B, position_B, tokens_BS):
    """Also bars each id that would complete n tokens in a row that occur before (n: ngram_B)."""
    slots_S = jnp.arange(tokens_BS.shape[1])
    # Slots whose token ends an earlier run of n tokens; then, one token after the other, those whose run is the newest.
    ends_BS = (ngram_B > 0)[:, None] & (slots_S >= ngram_B[:, None] - 1) & (slots_S <= position_B[:, None])

    def compare(back, ends_BS):  # the token `back` before the end with the one as far before the next token
        newest_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(position_B + 1 - back, 0)[:, None], axis=1)
        return ends_BS & ((jnp.roll(tokens_BS, back, axis=1) == newest_B1) | (back >= ngram_B)[:, None])

    most = jnp.minimum(jnp.max(ngram_B), tokens_BS.shape[1])
    ends_BS = jax.lax.fori_loop(1, most, compare, ends_BS)
    return barred_BV.at[jnp.arange(len(ngram_B))[:, None], tokens_BS].max(ends_BS, mode="drop")


def _bar_words(barred_BV, words, position_B, tokens_BS):
    """Also bars the last id of each sequence whose other ids are the newest tokens."""
    before = words.shape[-1] - 1
    recent = position_B[:, None] + 1 - before + jnp.arange(before)
    recent = jnp.take_along_axis(tokens_BS, jnp.maximum(recent, 0), axis=1)[:, None]
    size = jnp.sum(words >= 0, axis=-1)
    # transformers leaves out sequences that are longer than what there is, not only those whose beginning is.
    found = jnp.all((words[..., :-1] < 0) | (words[..., :-1] == recent), axis=-1) & (size <= position_B[:, None] + 1)
    last = jnp.where(words[..., -1] >= 0, words[..., -1], barred_BV.shape[-1])  # the padding is dropped
    return barred_BV.at[jnp.arange(len(position_B))[:, None], last].max(found, mode="drop")
