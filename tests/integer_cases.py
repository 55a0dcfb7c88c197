# SPDX-License-Identifier: Apache-2.0
"""Weights of integers in groups for tests of weight_only_matmul, and their products in float64."""

import jax.numpy as jnp
import numpy as np


def drawn(O, I, G, values=jnp.int4, *, offset=True, seed=0):
    """(values, scale, offset) with weights of about 1."""
    random = np.random.default_rng(seed)
    top = jnp.iinfo(values).max
    q = jnp.asarray(random.integers(-top - 1, top + 1, (O, I)), values)
    scale = jnp.asarray(random.uniform(0.5, 2, (O, G)) / top, jnp.float32)
    return q, scale, jnp.asarray(random.normal(size=(O, G)), jnp.float32) if offset else None


def exact(x, q, scale, offset):
    w = np.asarray(q, np.float64).reshape(*scale.shape, -1) * np.asarray(scale, np.float64)[..., None]
    w = w if offset is None else w - np.asarray(offset, np.float64)[..., None]
    return np.asarray(x, np.float64) @ w.reshape(q.shape).T
