# SPDX-License-Identifier: Apache-2.0
"""Means that are not divided yet, and sums over packed sequences."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.train.losses import Ratio, counted, sequence_sums


def test_ratios_add_up_to_the_ratio_of_the_whole():
    """1 target of loss 1 and 3 targets of loss 5: 16 / 4 per target, where a mean of means would say 3."""
    parts = [Ratio(jnp.float32(1.0), jnp.float32(1.0)), Ratio(jnp.float32(15.0), jnp.float32(3.0))]
    whole = Ratio(*(sum(x) for x in zip(*parts, strict=True)))
    assert float(whole.mean()) == pytest.approx(4.0)
    assert float(Ratio(jnp.float32(0.0), jnp.float32(0.0)).mean()) == 0  # and not nan


def test_what_does_not_count_may_be_anything():
    found = counted(jnp.array([1.0, jnp.nan, 3.0, jnp.inf]), jnp.array([1.0, 0.0, 0.5, 0.0]))
    assert (float(found.total), float(found.count)) == (2.5, 1.5)


def test_sums_of_the_sequences_of_a_row():
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    segments = np.array([[0, 0, 2, 2, 2, -1], [1, 1, 1, 1, 3, 3]])
    want = [[1, 0, 9, 0], [0, 30, 0, 21]]
    np.testing.assert_array_equal(sequence_sums(jnp.asarray(x), jnp.asarray(segments), 4), want)
