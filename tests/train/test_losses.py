# SPDX-License-Identifier: Apache-2.0
"""Losses add up over any split of the batch and equal their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.train import losses


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 7, 8)).astype(np.float32)
    head = rng.normal(size=(11, 8)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 7)).astype(np.int32)
    weights = (rng.random((2, 7)) < 0.5).astype(np.float32)
    return hidden, head, targets, weights


def test_equals_the_definition(case):
    hidden, head, targets, weights = case
    got = losses.next_token_loss(*map(jnp.asarray, case))
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(got.total, (nll * weights).sum(), rtol=1e-5)
    assert got.weight == weights.sum()
    np.testing.assert_allclose(got.mean(), (nll * weights).sum() / weights.sum(), rtol=1e-5)


def test_mean_is_over_targets_not_over_rows(case):
    """Rows of different numbers of targets: sums and counts of the parts give the whole; means of means would not."""
    hidden, head, targets, weights = case
    parts = [losses.next_token_loss(hidden[i : i + 1], head, targets[i : i + 1], weights[i : i + 1]) for i in range(2)]
    whole = losses.next_token_loss(*case)
    np.testing.assert_allclose(sum(p.total for p in parts) / sum(p.weight for p in parts), whole.mean(), rtol=1e-6)


def test_padding_is_neither_loss_nor_gradient(case):
    hidden, head, targets, weights = case
    wild = hidden.copy()
    wild[weights == 0] = 1e4
    loss = lambda h: losses.next_token_loss(h, head, targets, weights).mean()
    np.testing.assert_allclose(loss(wild), loss(hidden), rtol=1e-6)
    grad = np.asarray(jax.grad(loss)(jnp.asarray(wild)))
    assert np.isfinite(grad).all()
    assert (grad[weights == 0] == 0).all()


def test_nothing_to_predict_is_zero(case):
    hidden, head, targets, weights = case
    assert losses.next_token_loss(hidden, head, targets, 0 * weights).mean() == 0


def test_router_losses_are_off_unless_asked():
    tokens = losses.TokenLoss(jnp.float32(6.0), jnp.float32(3.0))
    assert losses.objective(tokens, load_balancing=5.0, router_z=7.0) == 2.0
    both = losses.objective(
        tokens, load_balancing=5.0, router_z=7.0, load_balancing_coefficient=0.1, router_z_coefficient=0.01
    )
    np.testing.assert_allclose(both, 2.57, rtol=1e-6)
