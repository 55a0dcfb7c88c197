# SPDX-License-Identifier: Apache-2.0
"""Few cases or many: Hypothesis settings for examples that take seconds and milliseconds, and cases for `-m slow`."""

import pytest
from hypothesis import HealthCheck, Phase, settings

FEW = settings(
    max_examples=12,
    deadline=None,  # an example that compiles takes seconds, the next one milliseconds
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a failure names its seed; shrinking would compile for minutes
    suppress_health_check=[HealthCheck.too_slow],
)
MANY = settings(
    max_examples=100,
    deadline=None,
    derandomize=False,  # other examples in every run, also where CI is set; a failure prints how to have it again
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def slow(*cases):
    """Cases of `parametrize` for `-m slow`: a quick case tests the same code, in another variant or on another mesh."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
