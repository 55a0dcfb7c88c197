# SPDX-License-Identifier: Apache-2.0
"""Routing, its statistics and its two losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from few import slow
from qwen2_jax import model
from qwen2_jax.model import mlp
from qwen2_jax.weights.params import Declare

CONFIG = tiny.CONFIGS["moe"]


def one_layer(config=CONFIG):
    """A SparseMLP without the leading dimension of stacked layers."""
    return mlp.SparseMLP(config, Declare(jax.random.key(0), dtype=jnp.float32, std=0.3))


@pytest.mark.parametrize("renormalise", [False, True])
def test_layer_is_the_definition(renormalise):
    layer = one_layer(dataclasses.replace(CONFIG, norm_topk_prob=renormalise))
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 7, CONFIG.hidden_size)))
    got, _ = jax.jit(lambda x: layer(x, jnp.ones((1, 7), bool)))(x)

    def swiglu(x, gate, up, down):
        g = np.asarray(gate, np.float64) @ x
        return np.asarray(down, np.float64) @ (g / (1 + np.exp(-g)) * (np.asarray(up, np.float64) @ x))

    for t, token in enumerate(x[0].astype(np.float64)):
        logits = np.asarray(layer.router_ED[...], np.float64) @ token
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-p)[: CONFIG.num_experts_per_tok]
        weights = p[best] / p[best].sum() if renormalise else p[best]
        want = sum(
            w * swiglu(token, layer.gate_EFD[...][e], layer.up_EFD[...][e], layer.down_EDF[...][e])
            for w, e in zip(weights, best, strict=True)
        )
        shared = swiglu(token, *(p[...] for p in (layer.shared.gate_FD, layer.shared.up_FD, layer.shared.down_DF)))
        want = want + shared / (1 + np.exp(-np.asarray(layer.shared_gate_D[...], np.float64) @ token))
        np.testing.assert_allclose(got[0, t], want, atol=1e-5)  # float32 against float64: 4.3e-6 of 12 was seen


def test_statistics_leave_padding_out():
    layer = one_layer()
    run = jax.jit(lambda x, real: layer(x, real)[1])
    x = jax.random.normal(jax.random.key(2), (2, 6, CONFIG.hidden_size))
    real = jnp.array([[True] * 6, [True] * 2 + [False] * 4])
    masked, first, second = run(x, real), run(x[:1], real[:1]), run(x[1:, :2], real[1:, :2])
    # Sums of float32 in parts: equal was seen.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, first + second)
    assert masked.tokens == 8
    assert masked.counts_E.sum() == 8 * CONFIG.num_experts_per_tok


def test_balanced_load_costs_exactly_top_k():
    E, k = CONFIG.num_experts, CONFIG.num_experts_per_tok
    even = mlp.RouterStats(jnp.full(E, 100 * k / E), jnp.full(E, 100 / E), jnp.float32(0), jnp.float32(100))
    assert mlp.load_balancing_loss(even) == pytest.approx(k)
    skewed = dataclasses.replace(even, counts_E=jnp.eye(E)[0] * 100 * k, probabilities_E=jnp.eye(E)[0] * 100)
    assert mlp.load_balancing_loss(skewed) == pytest.approx(E * k)


@pytest.mark.parametrize("loss", [*slow(mlp.load_balancing_loss), mlp.router_z_loss])
def test_router_losses_reach_the_router_of_every_layer(loss):
    graphdef, _ = model.declare(CONFIG)
    weights, ids = tiny.random_params(CONFIG), jnp.arange(24).reshape(2, 12)

    of = jax.jit(jax.value_and_grad(lambda weights: loss(nnx.merge(graphdef, weights)(ids).router)))
    gradient = of(weights)[1]["stacks"][0]["blocks"][0]["moe"]["router_ED"]
    assert gradient.shape[0] == CONFIG.num_hidden_layers
    assert (jnp.abs(gradient).max(axis=(1, 2)) > 0).all()
    # and it is the gradient: a finite difference along it agrees
    direction = gradient / jnp.linalg.norm(gradient)

    def moved(step):
        block = weights["stacks"][0]["blocks"][0]
        router = block["moe"]["router_ED"] + step * direction
        block = block | {"moe": block["moe"] | {"router_ED": router}}
        return of(weights | {"stacks": {0: {"blocks": {0: block}}}})[0]  # the same program again

    difference = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert float(difference) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=0.05)


def test_statistics_pool_over_layers():
    def router(config):
        graphdef, params = model.declare(config)[0], tiny.random_params(config)
        return jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.zeros((2, 12), jnp.int32)).router)(params)

    assert router(CONFIG).tokens == CONFIG.num_hidden_layers * 24
    assert router(tiny.CONFIGS["dense"]) is None
