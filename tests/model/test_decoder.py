# SPDX-License-Identifier: Apache-2.0
"""The decoder against itself: layouts, packing, padding, recomputation and the cache do not change what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from few import slow
from qwen2_jax.model import decoder, rope
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.weights import params
from tiny import random_params
from tolerance import close


def logits_of(config, weights, ids, *, unroll=False, **arguments):
    graphdef, _ = decoder.declare(config, unroll=unroll)

    @jax.jit
    def run(weights, ids):
        qwen2 = nnx.merge(graphdef, weights)
        return qwen2.logits(qwen2(ids, **arguments).hidden_BTD)

    return np.asarray(run(weights, jnp.asarray(ids, jnp.int32)))


def random_ids(config, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


@pytest.mark.parametrize("name", slow("dense", "moe_mixed"))  # quick: test_parity.py has both layouts
def test_stacked_and_unrolled_are_one_model(name):
    config = tiny.CONFIGS[name]
    stacked, unrolled = decoder.init(config, 3), decoder.init(config, 3, unroll=True)
    sliced = decoder.unroll(stacked, config)
    assert jax.tree.structure(sliced) == jax.tree.structure(unrolled)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), sliced, unrolled)))
    ids = random_ids(config, 2, 20)
    close(logits_of(config, stacked, ids), logits_of(config, unrolled, ids, unroll=True), units=16)  # equal was seen


def test_mixed_stacks_scan_over_their_period():
    config = tiny.CONFIGS["moe_mixed"]  # dense, sparse, dense, sparse, dense
    assert [(stack.kinds, stack.repeats) for stack in config.stacks()] == [(("dense",), 1), (("sparse", "dense"), 2)]
    assert [stack.repeats for stack in tiny.CONFIGS["sliding"].stacks()] == [4]  # windows are data, not structure


@pytest.mark.parametrize("name", [*slow("dense", "sliding"), "dual_chunk", *slow("moe_mixed")])
def test_packed_documents_equal_each_alone(name):
    config = tiny.CONFIGS[name]
    weights = random_params(config)
    first, second = random_ids(config, 1, 9, seed=1), random_ids(config, 1, 14, seed=2)
    alone = [logits_of(config, weights, first), logits_of(config, weights, second)]
    packed = logits_of(
        config,
        weights,
        np.concatenate([first, second], axis=1),
        positions_BT=jnp.concatenate([jnp.arange(9), jnp.arange(14)])[None],
        segments_BT=jnp.repeat(jnp.array([1, 2]), jnp.array([9, 14]), total_repeat_length=23)[None],
    )
    close(packed, np.concatenate(alone, axis=1), units=16)  # 6.2 was seen


@pytest.mark.parametrize("name", ["dense", *slow("sliding", "dual_chunk", "moe_mixed", "untied", "moe")])
def test_padding_changes_nothing(name):
    config = tiny.CONFIGS[name]
    weights, ids = random_params(config), random_ids(config, 2, 16)
    positions = np.tile(np.arange(16), (2, 1))
    positions[1, 11:] = -1
    padded = logits_of(config, weights, ids, positions_BT=jnp.asarray(positions))
    alone = logits_of(config, weights, ids[1:, :11])
    assert np.isfinite(padded).all()
    close(padded[1:, :11], alone, units=16)  # equal was seen


@pytest.mark.parametrize(
    ("name", "unroll"),
    [  # quick: test_generate.py decodes such models, and test_engine.py
        *slow(("sliding", False), ("dual_chunk", False), ("dense", True), ("moe_mixed", False)),
        *slow(("dense", False), ("untied", False), ("moe", False), ("moe_mixed", True)),
    ],
)
def test_cached_steps_equal_one_forward(name, unroll):
    config = tiny.CONFIGS[name]
    weights, ids = random_params(config, unroll=unroll), jnp.asarray(random_ids(config, 2, 40), jnp.int32)
    graphdef, _ = decoder.declare(config, unroll=unroll)
    rotary = rope.choose(config, 40, "dca" if name == "dual_chunk" else "off")
    whole = logits_of(config, weights, ids, unroll=unroll, rope=rotary)

    @jax.jit
    def step(weights, ids, positions, cache):
        qwen2 = nnx.merge(graphdef, weights)
        output = qwen2(ids, rope=rotary, positions_BT=positions, cache=cache)
        return qwen2.logits(output.hidden_BTD), output.cache

    cache, at, pieces = Cache.zeros(config, 2, 48, unroll=unroll), 0, []
    for width in (17, 1, 3, 17, 1, 1):  # prefill in chunks, single steps, a few at once
        positions = jnp.tile(jnp.arange(at, at + width), (2, 1))
        logits, cache = step(weights, ids[:, at : at + width], positions, cache)
        pieces.append(logits)
        at += width
    assert at == 40
    # How XLA:CPU orders a sum depends on the rows, its optimizations and the processor: 20 to 39 were seen.
    close(np.concatenate(pieces, axis=1), whole, units=80)


@pytest.mark.parametrize("name", slow("dense", "moe_mixed"))  # quick: test_step.py
def test_recomputation_keeps_the_gradient(name):
    config = tiny.CONFIGS[name]
    graphdef, _ = decoder.declare(config)
    weights, ids = random_params(config), jnp.asarray(random_ids(config, 2, 12), jnp.int32)

    def loss(weights, remat):
        qwen2 = nnx.merge(graphdef, weights)
        return jnp.square(qwen2.logits(qwen2(ids, remat=remat).hidden_BTD)).mean()

    plain = jax.jit(jax.grad(loss), static_argnums=1)(weights, None)  # below, equal was seen: XLA may fuse otherwise
    for policy in decoder.REMAT_POLICIES:
        again = jax.jit(jax.grad(loss), static_argnums=1)(weights, policy)
        jax.tree.map(lambda a, b: close(a, b, units=16), plain, again)
    assert all(float(jnp.abs(g).max()) > 0 for _, g in params.leaves(plain)), "some parameter gets no gradient"


def test_cache_holds_exactly_the_formula():
    config = tiny.CONFIGS["moe_mixed"]
    cache = Cache.zeros(config, 2, 64, jnp.bfloat16)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 2 * 64 * per_token


def test_cache_drops_padding_and_what_does_not_fit():
    layer = Cache.zeros(tiny.CONFIGS["dense"], 1, 4).layers[0][0]
    ones = jnp.ones((1, 3, layer.k.shape[2], layer.k.shape[4]))
    written = layer.write(1, ones, ones, jnp.array([[3, 4, -1]]))
    nothing = [False] * 4
    assert np.asarray(written.k.all(axis=(2, 4)))[:, 0].tolist() == [nothing, [False, False, False, True], nothing]


def test_segments_with_a_cache_are_refused():
    config = tiny.CONFIGS["dense"]
    qwen2 = nnx.merge(decoder.declare(config)[0], random_params(config))
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="one document per row"):
        qwen2(ids, cache=Cache.zeros(config, 1, 8), segments_BT=ids)


def test_attention_scores_beyond_half_precision():
    """Scores of Qwen2-7B overflow float16; bf16 inputs must still be accumulated and normalised in float32."""
    config = tiny.CONFIGS["dense"]
    weights = random_params(config)
    block = weights["stacks"][0]["blocks"][0]["attention"]
    block["bq_NH"], block["bk_KH"] = block["bq_NH"] + 120.0, block["bk_KH"] + 120.0  # scores of about 40,000
    ids = random_ids(config, 1, 24)
    assert np.isfinite(logits_of(config, weights, ids)).all()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights)
    assert np.isfinite(logits_of(config, half, ids)).all()
