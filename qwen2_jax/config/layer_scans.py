# SPDX-License-Identifier: Apache-2.0
"""Layers of several kinds cut into scans."""

import functools
from typing import NamedTuple


class Stack(NamedTuple):
    """Layers run by one scan: layer `first + r * len(kinds) + j` is block j of repeat r and is of kind `kinds[j]`."""

    kinds: tuple[str, ...]  # each "dense" or "sparse"
    first: int
    repeats: int


@functools.lru_cache(maxsize=64)
def shortest(kinds: tuple[str, ...]) -> tuple[Stack, ...]:
    """Stacks of layers of these kinds with as few blocks to compile as possible, then as few scans as possible."""
    # Dynamic programme from the last layer: best[i] = ((distinct blocks, scans), stacks) for the layers from i on.
    n = len(kinds)
    best: list[tuple[tuple[int, int], tuple[Stack, ...]]] = [((0, 0), ())] * (n + 1)
    for i in reversed(range(n)):
        options = []
        for period in range(1, n - i + 1):
            block, repeats = kinds[i : i + period], 1
            while kinds[i + (repeats - 1) * period : i + repeats * period] == block:
                (blocks, scans), rest = best[i + repeats * period]
                options.append(((blocks + period, scans + 1), (Stack(block, i, repeats), *rest)))
                repeats += 1
        best[i] = min(options, key=lambda option: option[0])
    return best[0][1]
