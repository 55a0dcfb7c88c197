# SPDX-License-Identifier: Apache-2.0
"""Sampling against transformers' processors, restated in numpy from their definitions (float64, one row)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.infer.engine import sampling
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from tolerance import close

V, REAL = 400, 390  # ids from REAL on are padding


def transformers_kept(logits, seen, s):
    """(scores, kept) after repetition penalty, temperature, top-k, top-p and min-p, as transformers applies them."""
    scores = logits[:REAL].astype(np.float64)
    hit = np.isin(np.arange(REAL), seen)
    scores = np.where(hit, np.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty), scores)
    scores = scores / s.temperature
    if s.top_k:
        scores = np.where(scores < np.sort(scores)[-min(s.top_k, REAL)], -np.inf, scores)
    if s.top_p < 1:
        order = np.argsort(scores)
        remove = np.cumsum(softmax(scores[order])) <= 1 - s.top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if s.min_p:
        probs = softmax(scores)
        scores = np.where(probs < s.min_p * probs.max(), -np.inf, scores)
    return scores


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def arrays(rows):
    def column(name, dtype):
        return jnp.asarray([getattr(s, name) for s in rows], dtype)

    return sampling.SamplingArrays(
        temperature_B=column("temperature", jnp.float32),
        top_k_B=column("top_k", jnp.int32),
        top_p_B=column("top_p", jnp.float32),
        min_p_B=column("min_p", jnp.float32),
        repetition_penalty_B=column("repetition_penalty", jnp.float32),
        seed_B=column("seed", jnp.uint32),
    )


@jax.jit
def draw(logits_BV, seen_BV, count_B, settings):
    return sampling.sample(logits_BV, seen_BV, count_B, settings, vocab_size=REAL)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    out = rng.normal(size=V).astype(np.float32) * 2
    out[REAL:] = 50.0  # a padded id that would win everything
    return out


SETTINGS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=20),
    SamplingParams(temperature=1.0, top_k=100),  # beyond the window
    SamplingParams(temperature=1.0, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=0.3),  # the nucleus fits the window
    SamplingParams(temperature=3.0, top_p=0.97),  # it does not
    SamplingParams(temperature=1.5, top_k=200, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=5, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=2.0, top_k=10_000, top_p=0.999),
]


def test_draws_what_transformers_keeps_with_its_probabilities(logits):
    """Every setting, 2000 draws each in one batch: only kept ids, all frequent ones, and the right frequencies."""
    draws, seen = 2000, np.array([3, 17, int(logits[:REAL].argmax()), 200])
    seen_V = np.zeros(V, bool)
    seen_V[seen] = True
    many = jax.jit(jax.vmap(draw, in_axes=(None, None, 0, None)))
    count_KB = jnp.broadcast_to(jnp.arange(draws)[:, None], (draws, 1))
    for s in SETTINGS:
        tokens = np.asarray(many(logits[None], seen_V[None], count_KB, arrays([s]))[0])[:, 0]
        want = softmax(transformers_kept(logits, seen, s))
        assert set(tokens) <= set(np.flatnonzero(want)), s
        got = np.bincount(tokens, minlength=REAL) / draws
        deviations = np.abs(got - want) / np.sqrt(np.maximum(want * (1 - want), 1e-9) / draws)
        assert deviations[want > 0.01].max(initial=0) < 4.5, s


def test_the_cut_is_the_same_whichever_way_it_is_found(logits):
    """The window and the search in the whole row agree, bit by bit, wherever both can answer."""
    row = jnp.asarray(np.where(np.arange(V) < REAL, logits, -np.inf))[None]
    ordered = np.sort(np.asarray(row))[:, ::-1].copy()
    rows = [dataclasses.replace(s, temperature=1.0, repetition_penalty=1.0, min_p=0.0) for s in SETTINGS]
    rows = [s for s in rows if s.top_k or s.top_p < 1]
    same = jnp.broadcast_to(row, (len(rows), V))
    few_B = jnp.asarray([0 < s.top_k < V for s in rows])
    in_window_B = sampling._cut_of_window(
        jnp.asarray(ordered).repeat(len(rows), axis=0), few_B, jax.nn.logsumexp(same, axis=-1), arrays(rows)
    )
    searched_B = jax.jit(sampling._search_cut)(same, arrays(rows))
    for s, in_window, searched in zip(rows, in_window_B, searched_B, strict=True):
        kept = transformers_kept(logits, np.array([], int), s)
        want = np.float32(kept[np.isfinite(kept)].min())
        assert searched == want, s
        assert in_window == want, s


def test_a_row_is_drawn_alike_in_any_company(logits):
    """Greedy, narrow and wide rows together, so that every path is taken: each row equals itself alone."""
    rows = [SamplingParams(temperature=0.0), *SETTINGS]
    rng = np.random.default_rng(1)
    logits_BV = np.stack([np.roll(logits, 7 * i) + rng.normal(size=V).astype(np.float32) for i in range(len(rows))])
    seen_BV = rng.random((len(rows), V)) < 0.1
    count_B = jnp.arange(len(rows)) + 5
    together, logprobs = draw(logits_BV, seen_BV, count_B, arrays(rows))
    for i, s in enumerate(rows):
        alone, logprob = draw(logits_BV[i : i + 1], seen_BV[i : i + 1], count_B[i : i + 1], arrays([s]))
        assert alone[0] == together[i], s
        close(logprob[0], logprobs[i])
        log_p = logits_BV[i] - np.log(np.exp(logits_BV[i].astype(np.float64)).sum())
        close(logprob[0], log_p[alone[0]])  # raw: padding and filters are not in it


def test_tempered_logprobs_are_of_the_divided_logits(logits):
    """The tokens stay as they are; a greedy row's log-probability is the model's own. No penalty: no ids seen."""
    rows = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.5, seed=1),
        SamplingParams(temperature=2.0, top_k=20),
    ]
    logits_BV, count_B = np.stack([logits] * 3), jnp.zeros(3, jnp.int32)
    plain, _ = draw(logits_BV, np.zeros((3, V), bool), count_B, arrays(rows))
    tokens, logprobs = draw(logits_BV, None, count_B, sampling.SamplingArrays.stacked(rows, tempered=True))
    assert tokens.tolist() == plain.tolist()
    for token, logprob, divisor in zip(tokens, logprobs, (1.0, 0.5, 2.0), strict=True):
        close(logprob, np.log(softmax(logits.astype(np.float64) / divisor))[token])


def test_greedy_takes_the_penalised_best_and_never_padding(logits):
    best, second = np.argsort(logits[:REAL])[[-1, -2]]
    seen_BV = np.zeros((2, V), bool)
    seen_BV[1, best] = True
    rows = [SamplingParams(), SamplingParams(repetition_penalty=10.0)]
    tokens, _ = draw(np.stack([logits] * 2), seen_BV, jnp.zeros(2, jnp.int32), arrays(rows))
    assert tokens.tolist() == [best, second]


def test_seeds_and_counts_change_the_noise():
    ids = jnp.arange(1000)[None]
    one = np.asarray(sampling.noise(jnp.uint32([1]), jnp.int32([0]), ids))
    assert np.isfinite(one).all()
    for seed, count in ((2, 0), (1, 1), (4294967295, 0)):
        other = np.asarray(sampling.noise(jnp.asarray([seed], jnp.uint32), jnp.int32([count]), ids))
        assert abs(np.corrcoef(one[0], other[0])[0, 1]) < 0.1
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(1000))[None]
    np.testing.assert_array_equal(sampling.noise(jnp.uint32([1]), jnp.int32([0]), shuffled)[0], one[0][shuffled[0]])
    assert abs(one.mean() - 0.5772) < 0.15  # Gumbel: mean 0.5772, standard deviation 1.2825
    assert abs(one.std() - 1.2825) < 0.15
