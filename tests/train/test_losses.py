# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch adds to the objective."""

import jax.numpy as jnp
import pytest

from qwen2_jax.moe import RouterStats
from qwen2_jax.train.losses import objective


def test_micro_batches_weigh_by_their_targets():
    """1 target of loss 1 and 3 targets of loss 5: 16 / 4 per target, where a mean of means would say 3."""
    assert float(sum(objective(jnp.float32(loss), jnp.float32(4.0)) for loss in (1.0, 15.0))) == pytest.approx(4.0)


def test_no_targets_is_zero_and_not_nan():
    assert float(objective(jnp.float32(0.0), jnp.float32(0.0))) == 0


def test_router_losses_are_added_with_their_coefficients():
    balanced = RouterStats(jnp.full(4, 6.0), jnp.full(4, 3.0), jnp.float32(24.0), jnp.float32(12.0))
    got = objective(jnp.float32(4.0), jnp.float32(2.0), balanced, load_balancing=0.5, router_z=0.25)
    assert float(got) == pytest.approx(2.0 + 0.5 * 2.0 + 0.25 * 2.0)  # 2 experts per token; 24 / 12
