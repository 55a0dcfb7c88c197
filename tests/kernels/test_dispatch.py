# SPDX-License-Identifier: Apache-2.0
"""Implementations are named: a name is an order, None takes the first that can."""

import pytest
from qwen2_jax.kernels.dispatch import dispatch


def refuses(x):
    raise NotImplementedError(f"needs an even number, got {x}")


def test_dispatch():
    table = {"fast": refuses, "slow": lambda x: x + 1}
    assert dispatch(table, None, 3) == 4
    assert dispatch(table, "slow", 3) == 4
    with pytest.raises(NotImplementedError, match="needs an even number, got 3"):
        dispatch(table, "fast", 3)
    with pytest.raises(ValueError, match=r"implementation='quick' is not one of \['fast', 'slow'\]"):
        dispatch(table, "quick", 3)
    with pytest.raises(NotImplementedError, match=r"fast: needs an even number, got 3; again: needs"):
        dispatch({"fast": refuses, "again": refuses}, None, 3)
