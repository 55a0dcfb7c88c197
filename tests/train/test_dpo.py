# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs and rankings against worked numbers in float64."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.train.objectives.dpo import (
    Preference,
    bradley_terry,
    pair_counts,
    pair_losses,
    pair_objective,
    pair_sums,
    ranking_groups,
)

EXACT = {"rel": 0, "abs": 1e-12}

# Two pairs whose h is 1 and -0.75; [pair, chosen or rejected].
REFERENCE = np.array([[[-3.0, -4.0], [-1.0, -2.5]]])
POLICY = REFERENCE + np.array([[[0.5, -0.5], [-0.75, 0.0]]])
TOKENS = np.array([[[2.0, 3.0], [3.0, 4.0]]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def nll_of_sigmoid(x):
    return -math.log(1 / (1 + math.exp(-x)))


def objective(config, logps, reference=REFERENCE, tokens=TOKENS):
    sums = pair_sums(config, jnp.asarray(logps), jnp.asarray(reference), jnp.asarray(tokens))
    return pair_objective(config, sums, pair_counts(jnp.asarray(tokens)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.687873400450183),
        ({"label_smoothing": 0.1}, 0.6891234004501829),
        ({"label_smoothing": 0.1, "robust": True}, 0.6863109004501831),
        ({"loss": "ipo"}, 24.28472222222222),
        ({"loss": "sigmoid_norm"}, 0.6891280744722499),
        ({"loss": "hinge"}, (0.9 + 1.075) / 2),
        ({"sft": 0.5}, 0.687873400450183 + 0.5 * 0.85),  # 0.85 = 4.25 / 5; the mean of the answers' means is 0.91667
    ],
)
def test_worked_numbers(options, expected):
    assert float(objective(Preference(**options), POLICY)) == pytest.approx(expected, **EXACT)


def test_losses_keep_the_shape_of_their_arguments():
    got = pair_losses(Preference(), *(jnp.asarray([x]) for x in ([0.5, -0.75], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0])))
    np.testing.assert_allclose(got, [[0.644396660074, 0.731350140827]], rtol=0, atol=1e-12)


def test_before_the_first_step_the_loss_is_ln_2_and_no_pair_is_right():
    sums = pair_sums(Preference(), *map(jnp.asarray, (REFERENCE, REFERENCE, TOKENS)))
    assert float(sums.loss) == pytest.approx(2 * math.log(2), **EXACT)
    assert float(sums.metrics["rewards/accuracies"].mean()) == 0


def test_metrics():
    sums = pair_sums(Preference(), *map(jnp.asarray, (POLICY, REFERENCE, TOKENS)))
    got = {name: float(ratio.mean()) for name, ratio in sums.metrics.items()}
    assert got == pytest.approx(
        {
            "rewards/chosen": -0.0125,
            "rewards/rejected": -0.025,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.0125,
            "logps/chosen": -2.125,
            "logps/rejected": -3.5,
        },
        **EXACT,
    )


def test_gradient_of_dpo_in_closed_form():
    """dL/d logp of the chosen answer is -beta sigmoid(-beta h) / pairs, of the rejected one the opposite."""
    got = jax.grad(lambda x: objective(Preference(), x))(POLICY)
    expected = [-0.1 / (1 + math.exp(0.1 * h)) / 2 for h in (1, -0.75)]
    np.testing.assert_allclose(got, [[[x, -x] for x in expected]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        Preference(loss="sigmoid", label_smoothing=0.2, sft=0.3),
        Preference(loss="sigmoid_norm", label_smoothing=0.2, robust=True),
        Preference(loss="ipo", beta=0.4),
        Preference(loss="hinge", beta=0.3),
    ],
    ids=lambda config: config.loss,
)
def test_gradients_are_the_finite_differences(config):
    assert_gradient(lambda x: objective(config, x), POLICY)


def assert_gradient(function, x, step=1e-5):
    got = jax.grad(function)(jnp.asarray(x))
    function = jax.jit(function)
    for index in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[index] = step
        difference = (function(x + nudge) - function(x - nudge)) / (2 * step)
        assert float(got[index]) == pytest.approx(float(difference), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_pairs_lacking_an_answer_are_left_out(loss):
    """Whatever stands in their place, also in the gradient."""
    config = Preference(loss=loss, sft=1.0)
    junk = np.array([[[np.nan, 1.0], [-7.0, np.inf]]])
    logps, reference = (np.concatenate([x, junk], axis=1) for x in (POLICY, REFERENCE))
    tokens = np.concatenate([TOKENS, [[[0.0, 5.0], [4.0, 0.0]]]], axis=1)
    assert pair_counts(jnp.asarray(tokens)) == (2, 5)
    value, gradient = jax.value_and_grad(lambda x: objective(config, x, reference, tokens))(logps)
    expected, part = jax.value_and_grad(lambda x: objective(config, x))(POLICY)
    assert float(value) == pytest.approx(float(expected), **EXACT)
    np.testing.assert_allclose(gradient[:, :2], part, rtol=0, atol=1e-15)
    assert not np.asarray(gradient[:, 2:]).any()


def test_micro_batches_add_up():
    config = Preference(sft=0.7)
    rows = np.random.default_rng(0).normal(size=(2, 4, 3, 2)) - 5
    tokens = np.random.default_rng(1).integers(0, 4, (4, 3, 2)).astype(float)
    whole = objective(config, rows[0], rows[1], tokens)
    counts = pair_counts(jnp.asarray(tokens))
    parts = [pair_sums(config, *(jnp.asarray(x[at]) for x in (*rows, tokens))) for at in (np.s_[:1], np.s_[1:])]
    assert float(sum(pair_objective(config, part, counts) for part in parts)) == pytest.approx(float(whole), **EXACT)
    both = jax.tree.map(jnp.add, *(part.metrics for part in parts))
    all_at_once = pair_sums(config, *map(jnp.asarray, (*rows, tokens))).metrics
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), both, all_at_once)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((counts, parts)))


def test_no_pairs_is_zero_and_not_nan():
    assert float(objective(Preference(sft=1.0), POLICY, tokens=np.zeros_like(TOKENS))) == 0


# Three pairs of answers: rewards of the better, of the worse.
SCORES = np.array([[[1.0, -0.3], [0.2, -0.3], [-1.1, -0.7]]])
ALL = np.ones_like(SCORES, bool)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.5427002301376839),
        ({"margin": np.array([1.0, 0.5, 0.0]).reshape(1, 3, 1, 1)}, 0.7201725591428083),
        ({"centring": 0.01}, 0.5551668968043505),
    ],
    ids=["plain", "margins", "centred"],
)
def test_bradley_terry_of_pairs(options, expected):
    sums = bradley_terry(SCORES, ALL, **options)
    assert int(sums.groups) == 3
    assert float(sums.loss / sums.groups) == pytest.approx(expected, **EXACT)
    got = {name: float(ratio.mean()) for name, ratio in sums.metrics.items()}
    assert got == pytest.approx(
        {
            "accuracy": 2 / 3,
            "margin": 1.4 / 3,
            "min_reward": -1.7 / 3,
            "mean_reward": -0.2,
            "max_reward": 0.5 / 3,
        },
        **EXACT,
    )


def test_right_answers_before_wrong_ones_makes_every_pair_of_a_right_and_a_wrong_one():
    """2 right ones of 6: 2 * 4 pairs, none of two right ones or two wrong ones (Qwen2.5-Math)."""
    scores = np.array([[[0.0, -0.1, -0.7, -0.8, -1.4, -2.1]]])
    sums = bradley_terry(scores, np.ones_like(scores, bool), ranks_BPQ=jnp.asarray([0, 0, 1, 1, 1, 1]))
    assert float(sums.loss) == pytest.approx(0.2898542640223437, **EXACT)
    assert float(sums.metrics["accuracy"].weight) == 8


def test_rankings_of_any_length_weigh_the_same():
    """Groups of 4, 3, 2, 1 and 0 answers, against a loop over their pairs."""
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(1, 5, 4))
    present = np.array([[[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]], bool)
    expected, right, pairs = 0.0, 0, 0
    for row, here in zip(scores[0], present[0], strict=True):
        both = list(itertools.combinations(row[here], 2))
        losses = [nll_of_sigmoid(a - b - 0.3) + 0.05 * (a + b) ** 2 for a, b in both]
        expected += np.mean(losses) if both else 0
        right, pairs = right + sum(a > b for a, b in both), pairs + len(both)
    junk = np.where(present, scores, np.nan)
    loss = lambda x: bradley_terry(x, present, margin=0.3, centring=0.05).loss
    sums = bradley_terry(junk, present, margin=0.3, centring=0.05)
    assert float(sums.loss) == pytest.approx(expected, **EXACT)
    assert int(sums.groups) == int(ranking_groups(present)) == 3
    assert float(sums.metrics["accuracy"].total) == right and float(sums.metrics["accuracy"].weight) == pairs
    assert all(np.isfinite(x) and x.dtype == jnp.float64 for x in jax.tree.leaves(sums))
    assert_gradient(loss, scores)
    assert np.isfinite(jax.grad(loss)(junk)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "orpo"}, "sigmoid_norm"),
        ({"beta": 0.0}, "usual: 0.01"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "'ipo' takes none"),
        ({"robust": True}, "set preference.label_smoothing"),
        ({"sft": -1.0}, "sft is -1.0"),
    ],
)
def test_what_a_config_refuses(options, message):
    with pytest.raises(UserError, match=message):
        Preference(**options)


def test_whole_numbers_pass_for_floats():
    assert dataclasses.astuple(Preference(beta=1, sft=2))[1] == 1.0
