# SPDX-License-Identifier: Apache-2.0
"""Means that are not divided yet, and sums over packed sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ahead_of_time
from qwen2_jax.train.objectives.loss_sums import Ratio, counted, sequence_sums


def test_ratios_add_up_to_the_ratio_of_the_whole():
    """1 target of loss 1 and 3 targets of loss 5: 16 / 4 per target, where a mean of means would say 3."""
    parts = [Ratio(jnp.float32(1.0), jnp.float32(1.0)), Ratio(jnp.float32(15.0), jnp.float32(3.0))]
    whole = Ratio(*(sum(x) for x in zip(*parts, strict=True)))
    assert float(whole.mean()) == pytest.approx(4.0)
    assert float(Ratio(jnp.float32(0.0), jnp.float32(0.0)).mean()) == 0  # and not nan


def test_sequence_sums():
    x = jnp.asarray([[1.0, 2.0, 4.0, jnp.nan], [8.0, 16.0, jnp.inf, 32.0]])
    segments = jnp.asarray([[0, 2, 0, -1], [1, 1, 7, 0]])
    np.testing.assert_array_equal(sequence_sums(x, segments, 3), [[5, 0, 2], [32, 24, 0]])
    gradient = jax.grad(lambda x: (sequence_sums(x, segments, 3) * jnp.asarray([[1.0, 2, 3], [4, 5, 6]])).sum())(x)
    np.testing.assert_array_equal(gradient, [[1, 3, 1, 0], [5, 5, 0, 4]])


def test_a_mean_of_values_ignores_what_has_no_weight():
    ratio = counted(jnp.asarray([2.0, jnp.nan, 5.0]), jnp.asarray([1.0, 0.0, 0.5]))
    assert float(ratio.total) == 4.5 and float(ratio.weight) == 1.5 and float(ratio.mean()) == 3.0
    nothing = counted(jnp.asarray([True]), jnp.asarray([False]))
    assert float(nothing.mean()) == 0 and nothing.total.dtype == jnp.float32


@pytest.mark.parametrize(
    "chip",
    [
        pytest.param("v5p", marks=ahead_of_time.TPU_COMPILER),
        pytest.param("h100", marks=ahead_of_time.GPU_COMPILER),
    ],
)
def test_sequence_sums_store_no_masks(chip):
    B, T, S = 2, 32768, 128
    place = NamedSharding(ahead_of_time.mesh_of(chip), PartitionSpec())
    args = [jax.ShapeDtypeStruct((B, T), dtype, sharding=place) for dtype in (jnp.float32, jnp.int32)]
    loss = lambda x, segments: (sequence_sums(x, segments, S) ** 2).sum()
    stored = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert stored < 4 * B * T, f"{stored:,} bytes; the masks of all sequences are {4 * B * T * S:,}"
