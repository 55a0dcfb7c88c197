# SPDX-License-Identifier: Apache-2.0
"""Chunked log-probabilities equal the plain ones and never hold all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.logprob import token_logprobs

B, T, D, V = 2, 13, 8, 50


def plain(hidden, head, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 5, 26, 1024])
def test_equal_to_log_softmax_with_gradients(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    np.testing.assert_allclose(
        token_logprobs(hidden, head, targets, chunk=chunk), plain(hidden, head, targets), atol=1e-5
    )
    chunked = jax.grad(lambda h, w: (token_logprobs(h, w, targets, chunk=chunk) ** 2).sum(), (0, 1))(hidden, head)
    whole = jax.grad(lambda h, w: (plain(h, w, targets) ** 2).sum(), (0, 1))(hidden, head)
    for a, b in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_memory_is_one_tile_not_all_logits():
    rows, vocabulary = 8192, 4096

    def loss(hidden, head, targets):
        return token_logprobs(hidden, head, targets, chunk=256).sum()

    arguments = (
        jax.ShapeDtypeStruct((1, rows, D), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
        jax.ShapeDtypeStruct((1, rows), jnp.int32),
    )
    used = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert used < rows * vocabulary * 4 / 5, f"{used / 2**20:.0f} MiB of temporaries"
