# SPDX-License-Identifier: Apache-2.0
"""Sending each token's copies to the devices that hold its experts and bringing the results home: nothing is dropped.

P devices along a mesh axis have their own tokens and E / P experts each. Rows wait on their device sorted by expert, so
a device has one slice for every expert. A holder wants its rows sorted by its experts, whoever they come from, because
that is what a grouped product takes; a ragged all-to-all puts every slice where it belongs there, and nothing is sorted
a second time. All of it follows from one small table, how many rows each device has for each expert.

A holder's rows may be anything from none to all rows of all devices. A buffer for the worst would be P times what is
needed, in memory and in every pass over it. So the rows go in rounds: a holder's order is cut into windows of a fixed
number of rows, SLACK times what it gets from even loads, and a round moves one window of every holder. With loads that
are nearly even there is one round; with all tokens on one device there are P / SLACK.

P devices, sources as well as holders  E experts  M tokens  k experts of a token  R rows of a source: M times k
C rows of a window  D width
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

NAMES = ("all_to_all", "gather")
SLACK = 1.5  # a window's rows, as a multiple of what a holder gets when loads are even
BLOCK = 8  # a window's rows are a multiple of it

Carry = TypeVar("Carry")


def choose(asked: str | None, devices: int, choices: int, itemsize: int) -> str:
    """The name of the exchange that moves fewer bytes between `devices` devices that hold different experts.

    For M tokens of D numbers on each device a gather brings everybody's tokens, (P - 1) M D numbers, and sends sums
    back, as many in float32. An all-to-all moves those of k M D numbers that belong to others, (P - 1) / P, there and
    back. So the latter is better where 2 k itemsize / P < itemsize + 4: in bfloat16 for k < 1.5 P. With gradients the
    two are at k < 1.4 P: five crossings (tokens twice, results, both their gradients) and seven.
    """
    if asked is not None:
        return asked
    return "all_to_all" if 2 * choices * itemsize < devices * (itemsize + 4) else "gather"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where every slice starts and ends. Tables are [P sources, E experts], the same on all devices."""

    begin_PE: jax.Array  # first row of a slice at its source
    rows_PE: jax.Array  # rows of a slice
    place_PE: jax.Array  # its first row in the holder's order: by expert, and for each expert by source
    window: int  # C
    axis: tuple[str, ...]
    everywhere: tuple[str, ...]

    @classmethod
    def of(cls, counts_E: jax.Array, tokens: int, choices: int, axis: tuple[str, ...], everywhere: tuple[str, ...]):
        """counts_E: rows of this device for each expert. tokens, choices: M and k of each device.

        axis: the mesh axes along which experts are split. everywhere: all axes of the mesh.
        """
        rows_PE = jax.lax.all_gather(counts_E, axis)
        (P, E), R = rows_PE.shape, tokens * choices
        at_holder_PX = rows_PE.T.reshape(P, -1)
        place_PE = (jnp.cumsum(at_holder_PX, axis=1) - at_holder_PX).reshape(E, P).T
        window = -(-int(SLACK * R) // BLOCK) * BLOCK
        most = P * tokens * min(choices, E // P)  # that a holder can get: a token's experts differ
        begin_PE = jnp.cumsum(rows_PE, axis=1) - rows_PE
        return cls(begin_PE, rows_PE, place_PE, min(window, most), axis, everywhere)

    def over_rounds(self, do: Callable[["Round", Carry], Carry], carry: Carry) -> Carry:
        """do(round, carry) for as many rounds as the busiest holder needs."""
        P = len(self.rows_PE)
        rounds = jnp.max(-(-self.rows_PE.reshape(P, P, -1).sum(axis=(0, 2)) // self.window))
        # Groups of other tokens would do with other numbers of rounds. That all devices of a mesh go through the same
        # collectives is what every backend is known to bear.
        rounds = jax.lax.pmax(rounds, self.everywhere)

        def turn(state):
            return state[0] + 1, do(Round.of(self, state[0]), state[1])

        return jax.lax.while_loop(lambda state: state[0] < rounds, turn, (jnp.int32(0), carry))[1]


@dataclasses.dataclass(frozen=True)
class Round:
    """One window of every holder's rows."""

    exchange: Exchange
    first: jax.Array  # of the window's rows, in the holder's order
    home_PE: jax.Array  # first row of what goes of a slice, at its source
    there_PE: jax.Array  # in the holder's window
    rows_PE: jax.Array  # number of rows, most often 0 or all of the slice

    @classmethod
    def of(cls, exchange: Exchange, number: jax.Array) -> "Round":
        first = number * exchange.window
        in_window = lambda row_PE: jnp.clip(row_PE - first, 0, exchange.window)  # noqa: E731
        there_PE = in_window(exchange.place_PE)
        rows_PE = in_window(exchange.place_PE + exchange.rows_PE) - there_PE
        gone_PE = jnp.clip(first - exchange.place_PE, 0, exchange.rows_PE)
        return cls(exchange, first, exchange.begin_PE + gone_PE, there_PE, rows_PE)

    @property
    def group_sizes_E(self) -> jax.Array:
        """Rows of each expert of this device in its window, [E / P]."""
        return self._mine(self.rows_PE).sum(axis=0)

    def there(self, rows_RD: jax.Array) -> jax.Array:
        """From the sources' rows the holder's window, [C, D]: rows by expert, then zeros."""
        me, mine = self._me(), self._mine
        window_CD = jnp.zeros((self.exchange.window, rows_RD.shape[1]), rows_RD.dtype)
        return send(
            rows_RD, window_CD, self.home_PE[me], self.rows_PE[me], self.there_PE[me], mine(self.rows_PE).reshape(-1),
            axis=self.exchange.axis,
        )  # fmt: skip

    def back(self, rows_CD: jax.Array, into_RD: jax.Array) -> jax.Array:
        """`into_RD` of each source, with its rows of the holders' windows where they started."""
        me, mine = self._me(), self._mine
        return send(
            rows_CD, into_RD, mine(self.there_PE).reshape(-1), mine(self.rows_PE).reshape(-1),
            mine(self.home_PE).reshape(-1), self.rows_PE[me], axis=self.exchange.axis,
        )  # fmt: skip

    def numbers_there(self, numbers_R: jax.Array) -> jax.Array:
        """As `there` for one number per row, [C]. They are few: everybody gets them all and picks."""
        all_PR = jax.lax.all_gather(numbers_R, self.exchange.axis)
        row_C = jnp.arange(self.exchange.window)
        starts_X, home_X = (self._mine(table).T.reshape(-1) for table in (self.there_PE, self.home_PE))
        slice_C = _last_start(starts_X, row_C)
        picked_C = all_PR[slice_C % len(all_PR), home_X[slice_C] + row_C - starts_X[slice_C]]
        return jnp.where(row_C < self.group_sizes_E.sum(), picked_C, 0)

    def numbers_back(self, numbers_C: jax.Array, into_R: jax.Array) -> jax.Array:
        """As `back` for one number per row."""
        all_PC = jax.lax.all_gather(numbers_C, self.exchange.axis)
        begin_E, place_E, rows_E = (
            table[self._me()] for table in (self.exchange.begin_PE, self.exchange.place_PE, self.exchange.rows_PE)
        )
        row_R = jnp.arange(len(into_R))
        expert_R = _last_start(begin_E, row_R)
        place_R = place_E[expert_R] + row_R - begin_E[expert_R] - self.first
        here_R = (row_R < rows_E.sum()) & (place_R >= 0) & (place_R < self.exchange.window)
        return jnp.where(here_R, all_PC[expert_R // (len(begin_E) // len(all_PC)), place_R], into_R)

    def _me(self) -> jax.Array:
        return jax.lax.axis_index(self.exchange.axis)

    def _mine(self, table_PE: jax.Array) -> jax.Array:
        """A table's columns of this device's experts, [P, E / P]."""
        P, E = table_PE.shape
        return jax.lax.dynamic_slice_in_dim(table_PE, self._me() * (E // P), E // P, axis=1)


def _last_start(starts_X: jax.Array, rows_Y: jax.Array) -> jax.Array:
    """Of slices with ascending starts the last that starts at or before each row: the one that has the row."""
    return jnp.searchsorted(starts_X, rows_Y, side="right", method="compare_all") - 1


def send(rows_XD, into_YD, from_S, sizes_S, to_S, come_S, *, axis: Sequence[str]) -> jax.Array:
    """jax.lax.ragged_all_to_all, also on CPU, where XLA does not have it.

    Slice s of S, S / P for each receiver, is rows from_S[s] and on, sizes_S[s] of them; the receiver puts them into its
    `into_YD` at to_S[s], and knows how many come, come_S.
    """

    def ragged(rows_XD, into_YD, *slices):
        return jax.lax.ragged_all_to_all(rows_XD, into_YD, *slices, axis_name=axis)

    return jax.lax.platform_dependent(
        rows_XD, into_YD, from_S, sizes_S, to_S, come_S,
        cpu=lambda *args: _padded(*args[:-1], axis=axis), default=ragged,
    )  # fmt: skip


def _padded(rows_XD, into_YD, from_S, sizes_S, to_S, *, axis: Sequence[str]) -> jax.Array:
    """The same by an all-to-all of equal parts: for every receiver as many rows as it could get from all senders."""
    P, row_Y = jax.lax.axis_size(axis), jnp.arange(len(into_YD))

    def part(begin_X, size_X, place_X):
        inside_YX = (row_Y[:, None] >= place_X) & (row_Y[:, None] < place_X + size_X)
        source_Y = jnp.sum(jnp.where(inside_YX, begin_X + row_Y[:, None] - place_X, 0), axis=1)
        return rows_XD[source_Y], inside_YX.any(axis=1)

    parts = jax.vmap(part)(*(x_S.reshape(P, -1) for x_S in (from_S, sizes_S, to_S)))
    rows_PYD, real_PY = (jax.lax.all_to_all(x, axis, 0, 0) for x in parts)
    sums_YD = jnp.sum(jnp.where(real_PY[..., None], rows_PYD, 0), axis=0, dtype=into_YD.dtype)
    return jnp.where(real_PY.any(axis=0)[:, None], sums_YD, into_YD)
