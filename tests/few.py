# SPDX-License-Identifier: Apache-2.0
"""Hypothesis settings: FEW where an example takes seconds (simulated chips), MANY where it takes milliseconds."""

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
