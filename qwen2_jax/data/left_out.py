# SPDX-License-Identifier: Apache-2.0
"""Lines that say what of the data is left out, and why."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The columns of Loaded.report and Prompts.report that count such records.
REASONS = {
    "empty": "no text, or only empty answers",
    "untargeted": "nothing in them is a target",
    "outside": "shorter than min_tokens or longer than max_tokens",
    "dropped": "longer than a row, or under too_long 'cut' without a target in its first tokens",
    "cut": "longer than a row, truncated",
}


def lines(report: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each source with records that are left out or cut, or with responses that are left out.

    report: of training or held-out data, a dict per source.
    """
    for found in report:
        if left := [f"{found[reason]:,} {reason}" for reason in REASONS if found.get(reason)]:
            yield f"{found['source']}: of {found['records']:,} records {', '.join(left)}"
        if found.get("tied"):
            yield (
                f"{found['source']}: of {found['responses']:,} responses {found['tied']:,} left out, whose score "
                "another of the same prompt has"
            )
