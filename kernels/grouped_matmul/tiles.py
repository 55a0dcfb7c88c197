# SPDX-License-Identifier: Apache-2.0
"""The visit list of a grouped matrix product: which tile of rows is multiplied by which expert's matrix.

Tiles begin at multiples of their size, groups begin and end at any row. A tile with a border between two groups inside
is listed once per expert that has rows in it, and an entry says which of the tile's rows belong to its expert. A kernel
iterates over the list and computes nothing else, so an expert without rows is neither read nor multiplied, and the work
is that of the rows that exist plus at most one tile per border.

Since rows are sorted by expert, one order is both by tile and by expert: all entries of a tile follow each other, and
so do all entries of an expert. Example: 12 rows in tiles of 4, groups of 3, 0, 6 and 2 rows, the last row in no group:

    row     0 1 2 3 | 4 5 6 7 | 8 9 10 11        entry   expert  tile  rows of the tile
    expert  0 0 0 2 | 2 2 2 2 | 2 3  3  -            0        0     0  0..3
                                                     1        2     0  3..4
                                                     2        2     1  0..4
                                                     3        2     2  0..1
                                                     4        3     2  1..3

M rows, E experts, Z entries of the list.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """Entries z < count in the order of the visits: tiles ascending, experts ascending.

    Entry z multiplies rows begin_Z[z] <= row < end_Z[z], counted from the first row of tile tile_Z[z], by the matrix of
    expert expert_Z[z]. An entry with begin == end covers something that has no rows. Entries from `count` on repeat the
    last tile and expert, with no rows.
    """

    expert_Z: jax.Array  # int32, as all of them
    tile_Z: jax.Array
    begin_Z: jax.Array
    end_Z: jax.Array
    count: jax.Array  # type: ignore[assignment]  # int32 []; tuples have a method of this name


def capacity(M: int, E: int, tile: int) -> int:
    """The most entries that any group sizes can make: one per tile, and one more per border between experts."""
    return -(-M // tile) + E - 1


@functools.partial(jax.jit, static_argnames=("M", "tile", "cover"))
def plan(group_sizes_E, M: int, tile: int, before=0, *, cover: str) -> Visits:
    """The list for M > 0 rows in tiles of `tile`. Groups that run over M are cut there.

    Args:
        before: rows before the first group. Tiles with none but these have no entry, or one where there is no other.
        cover: "tiles" if every tile must be visited, because a kernel writes a result per tile: tiles after the last
            group get one entry each, with the expert before them, so that no matrix is fetched for it.
            "experts" if every expert must be visited, because it writes a result per expert: an expert without rows
            gets one entry, with the tile of the entry before.
    """
    tiles, E = -(-M // tile), group_sizes_E.shape[0]
    end_E = jnp.minimum(before + jnp.cumsum(group_sizes_E, dtype=jnp.int32), M)
    begin_E = jnp.append(jnp.int32(before), end_E[:-1])
    some_E = end_E > begin_E
    first_E = jnp.minimum(begin_E // tile, tiles - 1)
    count_E = jnp.where(some_E, (end_E - 1) // tile - first_E + 1, int(cover == "experts"))
    stop_E = jnp.cumsum(count_E, dtype=jnp.int32)

    v = jnp.arange(capacity(M, E, tile), dtype=jnp.int32)
    last = jnp.max(jnp.where(some_E | (cover == "experts"), jnp.arange(E, dtype=jnp.int32), 0))
    expert_Z = jnp.minimum(jnp.sum(stop_E <= v[:, None], axis=1, dtype=jnp.int32), last)
    tile_Z = first_E[expert_Z] + v - (stop_E - count_E)[expert_Z]
    # After the last expert's entries the tiles continue: those without rows of any expert.
    tile_Z = jnp.clip(tile_Z, 0, tiles - 1)
    begin_Z, end_Z = (jnp.clip(x[expert_Z] - tile_Z * tile, 0, tile) for x in (begin_E, end_E))
    listed = v < stop_E[-1]
    begin_Z, end_Z = jnp.where(listed, begin_Z, 0), jnp.where(listed, end_Z, 0)
    count = stop_E[-1]
    if cover == "tiles":
        count += tiles - -(-end_E[-1] // tile)
    return Visits(expert_Z, tile_Z, begin_Z, end_Z, jnp.maximum(count, 1))  # a grid has at least one step


@functools.partial(jax.jit, static_argnames="E")
def runs(visits: Visits, E: int):
    """(run_Z, expert_of_run [E], count): the run of each entry, a run being consecutive entries of one expert.

    A kernel that prefetches matrices needs the expert of the next run.
    """
    changes_Z = visits.expert_Z[1:] != visits.expert_Z[:-1]
    run_Z = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(changes_Z, dtype=jnp.int32)])
    expert_of_run = jnp.zeros(E, jnp.int32).at[run_Z].set(visits.expert_Z)
    return run_Z, expert_of_run, run_Z[-1] + 1
