# SPDX-License-Identifier: Apache-2.0
"""Weights of integers in groups for tests of weight_only_matmul, their products in float64, and experts of them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from qwen2_jax.kernels.grouped_matmul import Scaled, grouped_matmul, grouped_swiglu

from tolerance import BFLOAT16, assert_no_worse


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


def experts_of(E, F, D, group, values=jnp.int4, *, offset=True, seed=0):
    """Matrices [E, F, D] as Scaled; with group None a scale for each output."""
    q, *factors = drawn(E * F, D, D // (group or D), values, offset=offset, seed=seed)
    in_groups = (E, F, D // group) if group else (E, F)
    return Scaled(q.reshape(E, F, D), *(s if s is None else s.reshape(in_groups) for s in factors))


def check_experts(implementation, where, sizes, M, F, D, group, values, offset, matrices=1, dtype=jnp.bfloat16):
    """grouped_matmul, or with two matrices grouped_swiglu, and the gradient of x, where `where()` simulates a device.

    Rows of no expert, and the factors of experts without rows, are not numbers.
    """
    E, sizes, wide = len(sizes), jnp.array(sizes), jnp.float32
    clean = [experts_of(E, F, D, group, values, offset=offset, seed=seed) for seed in range(matrices)]
    idle = lambda s: sizes.reshape(E, *[1] * (s.ndim - 1)) == 0
    dirty = [Scaled(w.values, *(s if s is None else jnp.where(idle(s), jnp.nan, s) for s in w[1:])) for w in clean]
    owned = (jnp.arange(M) < sizes.sum())[:, None]
    x, dy = (
        jnp.where(owned, jax.random.normal(jax.random.key(seed), (M, width)) / 8, jnp.nan).astype(dtype)
        for seed, width in ((1, D), (2, F))
    )

    def product(x, ws, name):
        if matrices == 2:
            return grouped_swiglu(x, *ws, sizes, implementation=name)
        return grouped_matmul(x, *ws, sizes, transpose_w=True, implementation=name)

    def both(name, x, dy, ws, context):
        with context:
            y, pull = jax.vjp(lambda x: product(x, ws, name), x)
            return jax.block_until_ready((y, *pull(dy)))

    got = both(implementation, x, dy, dirty, where())
    numbers = (jnp.where(owned, z, 0).astype(wide) for z in (x, dy))
    exact = both("reference", *numbers, clean, contextlib.nullcontext())
    for result, want in zip(got, exact, strict=True):
        assert_no_worse(result, want.astype(dtype), want, floor=BFLOAT16 if dtype == jnp.bfloat16 else 1e-5)
