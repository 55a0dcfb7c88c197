# SPDX-License-Identifier: Apache-2.0
"""Which rotary positions a request gets, and that plain, YaRN and DCA share one program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from qwen2_jax import PRESETS, model
from qwen2_jax.config import FULL, DualChunk, RopeScaling
from qwen2_jax.errors import UserError
from qwen2_jax.model import rope

DENSE = tiny.CONFIGS["dense"]
YARN = dataclasses.replace(
    DENSE, rope_scaling=RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=32)
)


def test_auto_leaves_short_requests_alone():
    short = rope.choose(YARN, 32)
    np.testing.assert_array_equal(short.inv_freq_Bf, rope.choose(DENSE, 32, "off").inv_freq_Bf)
    assert short.chunk_len_B[0] == FULL
    assert short.amplitude_B[0] == 1


def test_auto_follows_the_config_beyond_the_trained_length():
    long = rope.choose(YARN, 33)
    assert long.chunk_len_B[0] == FULL
    assert long.amplitude_B[0] == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert not np.array_equal(long.inv_freq_Bf, rope.choose(YARN, 32).inv_freq_Bf)


def test_auto_is_dual_chunk_for_qwen2_which_says_nothing():
    config = PRESETS["qwen2-7b"]  # says 131072 positions, was trained on 32768
    assert rope.choose(config, 32768).chunk_len_B[0] == FULL
    long = rope.choose(config, 32769)
    assert (long.chunk_len_B[0], long.chunk_size_B[0], long.original_length_B[0]) == (32768 - 512, 32768, 32768)
    # f(131072 / 32768)^2 of the Qwen2.5-1M report
    assert float(long.logit_scale(jnp.array([131072]))[0]) == pytest.approx(1.138629436111989**2, rel=1e-6)
    assert float(long.logit_scale(jnp.array([32768]))[0]) == 1


def test_auto_follows_a_dual_chunk_config_from_its_chunk_on():
    """A checkpoint that carries it asks for it, whatever the trained length is taken to be."""
    config = dataclasses.replace(
        DENSE, max_position_embeddings=256, dual_chunk_attention_config=DualChunk(chunk_size=64, local_size=8)
    )
    assert config.trained_length == 256
    rows = rope.choose(config, [64, 65])
    assert rows.chunk_len_B.tolist() == [FULL, 56] and rows.chunk_size_B.tolist() == [FULL, 64]
    assert rows.original_length_B.tolist() == [0, 0]  # no length factor where the config gives no length


def test_small_models_get_chunks_in_proportion():
    chunk = rope.dual_chunk_defaults(512)
    assert (chunk.chunk_size, chunk.local_size, chunk.original_max_position_embeddings) == (512, 8, 512)


def test_yarn_without_a_config_stretches_as_far_as_needed():
    config = dataclasses.replace(DENSE, max_position_embeddings=64)
    plain = rope.choose(config, 64, "off").inv_freq_Bf
    np.testing.assert_array_equal(rope.choose(config, 40, "yarn").inv_freq_Bf, plain)
    doubled = np.asarray(rope.choose(config, 128, "yarn").inv_freq_Bf)
    assert doubled[0, -1] == pytest.approx(plain[0, -1] / 2)


def test_rows_carry_their_own():
    both = rope.choose(YARN, [16, 100])
    np.testing.assert_array_equal(both.inv_freq_Bf[0], rope.choose(YARN, 16).inv_freq_Bf[0])
    np.testing.assert_array_equal(both.inv_freq_Bf[1], rope.choose(YARN, 100).inv_freq_Bf[0])


def test_unknown_mode_names_the_choices():
    with pytest.raises(UserError, match="'auto', 'off', 'yarn', 'dca'"):
        rope.choose(DENSE, 10, "longrope")


def test_one_program_serves_every_mode_and_chunks_change_nothing_while_one_is_enough():
    config = dataclasses.replace(DENSE, max_position_embeddings=32)
    graphdef, _ = model.declare(config)
    traces = []

    @jax.jit
    def run(weights, ids, rotary):
        traces.append(1)
        qwen2 = nnx.merge(graphdef, weights)
        return qwen2.logits(qwen2(ids, rope=rotary).hidden_BTD)

    weights = tiny.random_params(config)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, 80)), jnp.int32)
    long = {mode: np.asarray(run(weights, ids, rope.choose(config, 80, mode))) for mode in ("off", "yarn", "dca")}
    assert len(traces) == 1
    for a, b in (("off", "yarn"), ("off", "dca"), ("yarn", "dca")):
        assert np.abs(long[a] - long[b]).max() > 1e-3
    # chunk 32, local 1: chunks of 31 tokens, the first one is ordinary attention to the bit
    np.testing.assert_array_equal(long["off"][:, :31], np.asarray(run(weights, ids, _unscaled(config)))[:, :31])
    short = ids[:, :31]
    one_chunk = [np.asarray(run(weights, short, rope.choose(config, 31, mode))) for mode in ("off", "dca")]
    np.testing.assert_array_equal(*one_chunk)


def _unscaled(config):
    return dataclasses.replace(rope.choose(config, 80, "dca"), original_length_B=jnp.zeros(1))


def test_static_plain_equals_runtime_plain():
    graphdef, _ = model.declare(DENSE)
    weights, ids = tiny.random_params(DENSE), jnp.arange(40)[None] % DENSE.vocab_size
    run = jax.jit(lambda weights, rotary: nnx.merge(graphdef, weights)(ids, rope=rotary).hidden_BTD)
    np.testing.assert_array_equal(run(weights, None), run(weights, rope.choose(DENSE, 40, "off")))
