# SPDX-License-Identifier: Apache-2.0
"""The wider model, whose heads divide, is the model: same logits, same weights when narrowed again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from few import MANY, slow
from qwen2_jax import PRESETS, model
from qwen2_jax.model import head_padding, lora
from qwen2_jax.weights import int8
from tiny import CONFIGS, random_params
from tolerance import close


def mesh(tensor):
    return AbstractMesh((tensor,), ("tensor",))


@pytest.mark.parametrize(
    ("preset", "tensor", "query", "key"),
    [
        ("qwen2-0.5b", 2, None, None),  # 14:2
        ("qwen2-0.5b", 4, 16, 4),
        ("qwen2-0.5b", 8, 16, 8),
        ("qwen2-1.5b", 8, 16, 8),  # 12:2
        ("qwen2-7b", 8, 32, 8),  # 28:4
        ("qwen2-7b", 16, 32, 16),
        ("qwen2-72b", 8, None, None),  # 64:8
        ("qwen2-72b", 16, 64, 16),
        ("qwen2-57b-a14b", 8, 32, 8),  # 28:4
    ],
)
def test_heads_of_every_size(preset, tensor, query, key):
    found = head_padding.spread(PRESETS[preset], mesh(tensor))
    wider = (None, None) if found is None else (found.config.num_attention_heads, found.config.num_key_value_heads)
    assert wider == (query, key)


def test_no_mesh_and_no_axis_change_nothing():
    assert head_padding.spread(PRESETS["qwen2-7b"], None) is None
    assert head_padding.spread(PRESETS["qwen2-7b"], AbstractMesh((8,), ("fsdp",))) is None


@settings(MANY, max_examples=20)  # each compiles
@given(keys=st.integers(1, 6), group=st.integers(1, 7), tensor=st.integers(2, 16))
def test_every_query_meets_its_key_once(keys, group, tensor):
    """Numbers in place of weights: each query head stands once, beside a copy of its own key head; 0 is filled up."""
    sizes = {"num_attention_heads": keys * group, "num_key_value_heads": keys, "head_dim": 8}
    config = dataclasses.replace(CONFIGS["dense"], **sizes)
    found = head_padding.spread(config, mesh(tensor))
    if found is None:
        assert keys % tensor == 0
        return
    N, K = found.config.num_attention_heads, found.config.num_key_value_heads
    assert N % tensor == K % tensor == N % K == 0
    queries, held = found._wider_queries(1 + jnp.arange(keys * group)), found._wider_keys(1 + jnp.arange(keys))
    assert (queries.shape, held.shape) == ((N,), (K,))
    queries, held = np.asarray(queries), np.repeat(np.asarray(held), N // K)
    real = queries > 0
    assert sorted(queries[real]) == list(range(1, keys * group + 1))
    np.testing.assert_array_equal((queries[real] - 1) // group, held[real] - 1)
    np.testing.assert_array_equal(found._own_queries(jnp.asarray(queries)), 1 + np.arange(keys * group))


@pytest.mark.parametrize(
    ("storage", "tensor", "unroll"),
    [
        ("plain", 4, False),
        *slow(("adapted", 16, False), ("int8", 8, True)),
        *slow(("plain", 8, True), ("plain", 16, False), ("int8", 4, False)),
        *slow(("int8", 16, False), ("adapted", 4, False), ("adapted", 8, True)),
    ],
)
def test_the_wider_model_gives_the_same(storage, tensor, unroll):
    config = CONFIGS["dense"]  # 6:2
    found = head_padding.spread(config, mesh(tensor))
    params, specs = random_params(config, unroll=unroll), model.declare(config, unroll=unroll)[1]
    rank = lora.Lora(rank=2)
    if storage == "int8":
        params = int8.quantize(params, specs)
    elif storage == "adapted":
        adapters = lora.init(config, rank, jax.random.key(0), unroll=unroll)
        adapters = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, adapters)
        params = lora.attach(params, adapters, rank)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 11)))

    @functools.partial(jax.jit, static_argnums=0)
    def logits(config, params):
        qwen2 = nnx.merge(model.declare(config, unroll=unroll)[0], params)
        return qwen2.logits(qwen2(tokens).hidden_BTD)

    wide = jax.jit(lambda params: found.widen(params, specs))(params)
    want, got = logits(config, params), logits(found.config, wide)
    close(got, want, units=16)  # 3.3 was seen
    assert jax.tree.map(jnp.shape, wide) != jax.tree.map(jnp.shape, params)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda wide: found.narrow(wide, specs))(wide), params)
