# SPDX-License-Identifier: Apache-2.0
"""Divides layers of several kinds into scans."""

import functools
from typing import NamedTuple


class LayerScan(NamedTuple):
    """Layers run by one scan: layer `first + r * len(kinds) + j` is block j of repeat r and is of kind `kinds[j]`."""

    kinds: tuple[str, ...]  # each "dense" or "sparse"
    first: int
    repeats: int


@functools.lru_cache(maxsize=64)
def shortest(kinds: tuple[str, ...]) -> tuple[LayerScan, ...]:
    """Scans over layers of these kinds with as few blocks to compile as possible, then as few scans as possible."""
    # Dynamic programme from the last layer: best[i] = (distinct blocks, scans) for the layers from i on, and chosen[i]
    # the first of these scans as (period, repeats). equal[p]: how many layers from i on are of the kind of those p on.
    n = len(kinds)
    best, chosen = [(0, 0)] * (n + 1), [(0, 0)] * n
    equal = [0] * (n + 1)
    for i in reversed(range(n)):
        best[i] = (n + 1, 0)
        for period in range(1, n - i + 1):
            equal[period] = equal[period] + 1 if i + period < n and kinds[i] == kinds[i + period] else 0
            for repeats in range(1, equal[period] // period + 2):
                blocks, scans = best[i + repeats * period]
                if (blocks + period, scans + 1) < best[i]:
                    best[i], chosen[i] = (blocks + period, scans + 1), (period, repeats)
    stacks, i = [], 0
    while i < n:
        period, repeats = chosen[i]
        stacks.append(LayerScan(kinds[i : i + period], i, repeats))
        i += period * repeats
    return tuple(stacks)
