# SPDX-License-Identifier: Apache-2.0
"""Hypothesis settings for properties whose every example runs compiled programs: few examples, the same each time."""

from hypothesis import HealthCheck, Phase, settings

FEW = settings(
    max_examples=12,
    deadline=None,  # an example that compiles takes seconds, the next one milliseconds
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a failure names its seed; shrinking would compile for minutes
    suppress_health_check=[HealthCheck.too_slow],
)
