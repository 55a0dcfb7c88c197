# SPDX-License-Identifier: Apache-2.0
"""Samples the next token of every row on the device, with sampling parameters that are run-time arrays.

The filters are those of transformers, in its order: repetition penalty, temperature, top-k, top-p, min-p. A row's token
depends on that row's logits, parameters and count of generated tokens alone, never on the rows beside it: noise is a
hash of (seed, count, token id), and which of the code paths below a batch takes changes no result.

Sorting a vocabulary of 152k takes longer on a CPU than a small model's whole step. So the WINDOW best candidates are
looked at first; where they settle the matter for every row (greedy rows, top-k up to WINDOW - 1, a nucleus that fits)
there is no search in the vocabulary and no noise for all of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.infer.engine.constraints import ConstraintArrays
from qwen2_jax.infer.engine.sampling_params import MAX_EOS_IDS, MAX_INT, SamplingParams

# B rows  V vocabulary  C candidates, best first
WINDOW = 65
COLDEST = 1e-30  # a lower temperature is greedy: logits divided by it would not be finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """How each row's token is chosen; float32 [B] unless noted.

    temperature_B: 0 is greedy (the other settings but the penalty are then unused). top_k_B: int32, 0 is off.
    top_p_B: in (0, 1], 1 is off. min_p_B: in [0, 1], 0 is off. seed_B: uint32. repetition_penalty_B: above 0, 1 is off;
    None where it is off in all rows, which then need not record the ids that they have seen.
    tempered: a bool known at compile time, whether log-probabilities are of the logits divided by the temperature.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    seed_B: jax.Array
    repetition_penalty_B: jax.Array | None
    tempered: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def stacked(cls, rows: Sequence[SamplingParams], *, tempered: bool = False) -> "SamplingArrays":
        """One row for each request, as numpy arrays."""
        penalised = any(row.repetition_penalty != 1 for row in rows)
        temperatures = [row.temperature if row.temperature >= COLDEST else 0.0 for row in rows]
        return cls(
            temperature_B=cast(jax.Array, np.asarray(temperatures, np.float32)),
            top_k_B=_column(rows, "top_k", np.int32),
            top_p_B=_column(rows, "top_p", np.float32),
            min_p_B=_column(rows, "min_p", np.float32),
            seed_B=_column(rows, "seed", np.uint32),
            repetition_penalty_B=_column(rows, "repetition_penalty", np.float32) if penalised else None,
            tempered=tempered,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """The sampling parameters of each row, as the decode loop reads them. They do not change while it runs.

    limit_B: int32, most tokens to sample. eos_ids: int32 [B, MAX_EOS_IDS], ids that end a row, padded with -1.
    sampling: None where all rows are greedy and without penalty. Such a batch takes a program without any sampling in
    it, which compiles faster. constraints: None where no row has any.
    """

    limit_B: jax.Array
    eos_ids: jax.Array
    sampling: SamplingArrays | None
    constraints: ConstraintArrays | None = None

    @classmethod
    def stacked(
        cls, rows: Sequence[SamplingParams], *, vocabulary: int | None = None, tempered: bool = False
    ) -> "RowParams":
        """One row for each request, as numpy arrays. vocabulary: the width of the logits; None where no row has
        constraints. tempered: as in SamplingArrays; greedy rows are then sampled too, so that one program serves every
        mixture of rows."""
        eos_ids = np.full((len(rows), MAX_EOS_IDS), -1, np.int32)
        for row, params in enumerate(rows):
            if not params.ignore_eos:
                eos_ids[row, : len(params.eos_ids)] = params.eos_ids
        sampled = tempered or any(row.temperature > 0 or row.repetition_penalty != 1 for row in rows)
        return cls(
            limit_B=_column(rows, "max_new_tokens", np.int32),
            eos_ids=cast(jax.Array, eos_ids),
            sampling=SamplingArrays.stacked(rows, tempered=tempered) if sampled else None,
            constraints=None if vocabulary is None else ConstraintArrays.stacked(rows, vocabulary),
        )

    @property
    def penalised(self) -> bool:
        """Whether a row has a repetition penalty. Known at compile time."""
        return self.sampling is not None and self.sampling.repetition_penalty_B is not None

    @property
    def reads_history(self) -> bool:
        """Whether a row has constraints on its tokens so far. Known at compile time."""
        return self.constraints is not None and self.constraints.history is not None

    @property
    def kind(self) -> str:
        """Which of the decode loops serves these rows."""
        name = "greedy" if self.sampling is None else "sample, penalty" if self.penalised else "sample"
        return name if self.constraints is None else f"{name}, constraints"


def _column(rows: Sequence[SamplingParams], name: str, dtype) -> jax.Array:
    values = [getattr(row, name) for row in rows]
    if dtype is np.int32:  # a top_k beyond it keeps every token, as this does
        values = [min(value, MAX_INT) for value in values]
    return cast(jax.Array, np.asarray(values, dtype))


def sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    count_B: jax.Array,
    sampling: SamplingArrays | None,
    *,
    vocab_size: int,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row.

    logits_BV: float32. seen_BV: bool, ids in the row's prompt and answer so far; None where no row has a penalty.
    count_B: int32, tokens generated so far. sampling: None is greedy for every row. vocab_size: ids from here on are
    padding of the embedding and are never sampled. constrain: puts -inf into scores, after the penalty.
    Returns (tokens int32 [B], logprobs float32 [B]): the log-softmax at the sampled token of the unfiltered logits, or
    of those logits divided by the temperature (sampling.tempered; greedy rows: by 1). The log-probability is not finite
    where a row's logits are not, and where `constrain` leaves no token; the token then means nothing.
    """
    ids_V = jnp.arange(logits_BV.shape[-1])
    scores_BV = jnp.where(ids_V < vocab_size, logits_BV, -jnp.inf)
    if sampling is not None and sampling.repetition_penalty_B is not None:
        assert seen_BV is not None
        scores_BV = _penalise(scores_BV, seen_BV, sampling.repetition_penalty_B)
    left_B = None
    if constrain is not None:
        scores_BV = constrain(scores_BV)
        left_B = jnp.any(scores_BV > -jnp.inf, axis=-1)
    if sampling is None:
        tokens_B = _greedy(scores_BV)
    else:
        tokens_B = jax.lax.cond(
            jnp.any(sampling.temperature_B > 0), _sample, lambda s, *_: _greedy(s), scores_BV, count_B, sampling
        )
        if sampling.tempered:
            logits_BV = logits_BV / _divisor(sampling)
    # A sum of one number: devices that have parts of the vocabulary add theirs up. A look-up would gather all logits.
    chosen_B = jnp.sum(jnp.where(ids_V == tokens_B[:, None], logits_BV, 0), axis=-1)
    logprobs_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    return tokens_B, logprobs_B if left_B is None else jnp.where(left_B, logprobs_B, jnp.nan)


def noise(seed_B: jax.Array, count_B: jax.Array, ids_BC: jax.Array) -> jax.Array:
    """Standard Gumbel noise for these token ids, float32 [B, C]: the same for an id wherever it stands.

    Adding it to log-probabilities and taking the largest samples from them (the Gumbel-max trick).
    """

    def row(seed, count, ids_C):
        words = jnp.stack([seed.astype(jnp.uint32), count.astype(jnp.uint32)])
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        words_C2 = jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_C))
        return words_C2[:, 0] ^ words_C2[:, 1]  # one hash an id: the folded key itself is its random bits

    bits_BC = jax.vmap(row)(seed_B, count_B, ids_BC)
    # Fine steps near 0, where the large noise comes from: 24-bit uniforms near 1 would cap it at 16.6.
    uniform_BC = jnp.minimum((bits_BC.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform_BC))


def _greedy(scores_BV: jax.Array) -> jax.Array:
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)


def _penalise(scores_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Keskar et al. 2019, arXiv:1909.05858, with the sign rule of transformers: always less likely."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1), scores_BV)


def _divisor(sampling: SamplingArrays) -> jax.Array:
    """The temperatures, 1 for greedy rows, float32 [B, 1]."""
    return jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)[:, None]


def _sample(scores_BV: jax.Array, count_B: jax.Array, sampling: SamplingArrays) -> jax.Array:
    sampled_B = sampling.temperature_B > 0
    scaled_BV = scores_BV / _divisor(sampling)
    vocabulary = scaled_BV.shape[-1]
    window = min(WINDOW, vocabulary)
    # The barrier keeps XLA:CPU's fast top-k: slices of its result would otherwise turn it back into a full sort.
    best_BC, ids_BC = jax.lax.optimization_barrier(jax.lax.top_k(scaled_BV, window))
    few_B = (sampling.top_k_B > 0) & (sampling.top_k_B < window)
    cut_B = _cut_of_window(best_BC, few_B, jax.nn.logsumexp(scaled_BV, axis=-1), sampling)
    # Settled: whatever is outside the window is below the cut. With top_k beyond the window the kept tokens' mass is
    # unknown, so such a row cannot be judged here.
    settled_B = (best_BC[:, -1] < cut_B) & (few_B | (sampling.top_k_B == 0))
    settled_B |= ~sampled_B | (window == vocabulary)

    def from_window(scaled_BV, cut_B):
        noisy_BC = best_BC + noise(sampling.seed_B, count_B, ids_BC)
        choice_B = jnp.argmax(jnp.where(best_BC >= cut_B[:, None], noisy_BC, -jnp.inf), axis=-1)
        return jnp.take_along_axis(ids_BC, choice_B[:, None], axis=-1)[:, 0]

    def from_all(scaled_BV, cut_B):
        open_B = (sampling.top_k_B == 0) & (sampling.top_p_B >= 1)  # min-p alone needs no search
        searched_B = ~(settled_B | open_B)
        found_B = jax.lax.cond(jnp.any(searched_B), _search_cut, lambda x, _: x[:, 0], scaled_BV, sampling)
        found_B = jnp.maximum(found_B, best_BC[:, 0] + jnp.log(sampling.min_p_B))
        open_cut_B = best_BC[:, 0] + jnp.log(sampling.min_p_B)
        cut_B = jnp.where(settled_B, cut_B, jnp.where(open_B, open_cut_B, found_B))
        ids_BV = jnp.broadcast_to(jnp.arange(vocabulary), scaled_BV.shape)
        # The barrier keeps the hashes out of the argmax, whose loop XLA:CPU does not vectorise (10x slower).
        noisy_BV = scaled_BV + jax.lax.optimization_barrier(noise(sampling.seed_B, count_B, ids_BV))
        return jnp.argmax(jnp.where(scaled_BV >= cut_B[:, None], noisy_BV, -jnp.inf), axis=-1)

    drawn_B = jax.lax.cond(jnp.all(settled_B), from_window, from_all, scaled_BV, cut_B)
    return jnp.where(sampled_B, drawn_B, jnp.argmax(scores_BV, axis=-1)).astype(jnp.int32)


# A cut is the lowest scaled score that the filters keep. It is a value: candidates that tie with the last one kept are
# kept with it, as in transformers' top-k (its top-p breaks such ties by the order of its sort).


def _cut_of_window(best_BC: jax.Array, few_B: jax.Array, all_mass_B: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """The cut among the best candidates, given in descending order.

    few_B: rows whose top_k is below C. all_mass_B: log of the sum of exponentials over the whole row, against which
    top-p is measured where top-k is off.
    """
    count = best_BC.shape[-1]
    first_C = jnp.arange(count) == 0
    kth_B1 = jnp.take_along_axis(best_BC, jnp.where(few_B, sampling.top_k_B, count)[:, None] - 1, axis=-1)
    kept_BC = best_BC >= kth_B1
    kept_mass_B = jax.nn.logsumexp(jnp.where(kept_BC, best_BC, -jnp.inf), axis=-1)
    mass_B = jnp.where(few_B, kept_mass_B, all_mass_B)
    probs_BC = jnp.where(kept_BC, jnp.exp(best_BC - mass_B[:, None]), 0.0)
    better_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC  # mass of the candidates ranked above this one
    top_p_B1 = sampling.top_p_B[:, None]
    kept_BC &= first_C | (top_p_B1 >= 1) | (better_BC < top_p_B1)
    kept_BC &= first_C | (best_BC >= best_BC[:, :1] + jnp.log(sampling.min_p_B)[:, None])
    return jnp.min(jnp.where(kept_BC, best_BC, jnp.inf), axis=-1)


def _search_cut(scaled_BV: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """The cut of top-k and top-p over a whole row, found by bisection: 10x faster on a CPU than sorting the row."""
    top_k_B = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, scaled_BV.shape[-1]).astype(jnp.float32)
    kth_B = _lowest_kept(scaled_BV, jnp.ones_like(scaled_BV), top_k_B)
    probs_BV = jax.nn.softmax(jnp.where(scaled_BV >= kth_B[:, None], scaled_BV, -jnp.inf), axis=-1)
    nucleus_B = _lowest_kept(scaled_BV, probs_BV, sampling.top_p_B)
    return jnp.where(sampling.top_p_B >= 1, kth_B, jnp.maximum(kth_B, nucleus_B))


def _lowest_kept(scores_BV: jax.Array, weights_BV: jax.Array, limit_B: jax.Array) -> jax.Array:
    """The lowest score x of each row such that the scores above x weigh less than limit_B, which is positive.

    Bisects over the 2^32 float32 values in their order, so the answer is exact.
    """
    ordered_BV = _order(jax.lax.bitcast_convert_type(scores_BV, jnp.int32))

    def halve(_, bounds):
        low_B, high_B = bounds  # the answer is above low_B and at most high_B
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        above_B = jnp.sum(jnp.where(ordered_BV > middle_B[:, None], weights_BV, 0.0), axis=-1)
        enough_B = above_B < limit_B
        return jnp.where(enough_B, low_B, middle_B), jnp.where(enough_B, middle_B, high_B)

    lowest_B, high_B = ordered_BV.min(axis=-1), ordered_BV.max(axis=-1)
    found_B = jax.lax.fori_loop(0, 32, halve, (lowest_B - 1, high_B))[1]
    found_B = jnp.maximum(found_B, lowest_B)  # the whole row may weigh less than the limit
    return jax.lax.bitcast_convert_type(_order(found_B), jnp.float32)


def _order(bits: jax.Array) -> jax.Array:
    """Bits of float32 as integers in the order of the floats; its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
