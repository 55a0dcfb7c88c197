# SPDX-License-Identifier: Apache-2.0
"""Sends copies of tokens to the devices that hold their experts, and the results back. No token is dropped.

P devices along a mesh axis have their own tokens and E / P experts each. A device (source) first sorts its rows by
expert, so it has one slice of rows for every expert. The device that holds the experts (holder) needs the rows of all
sources sorted by expert, as a grouped product takes them; a ragged all-to-all writes every slice to its position in
that order, so nothing is sorted again. Everything follows from one small table: the number of rows of each source for
each expert.

A holder may get any number of rows, from none to all rows of all devices. A buffer for the worst case would be P times
as large as usually needed. So the rows are sent in rounds: a holder's rows are cut into windows of a fixed size, SLACK
times the number of rows under an even load, and a round sends one window of every holder. With a nearly even load there
is one round; with all tokens on one device there are P / SLACK.

p device, as source or as holder (P of them)  E expert  M token  k expert of a token  r row of a source (M times k)
c row of a window  s, x slice  y row of a receiver's array  D width
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

NAMES = ("all_to_all", "gather")
SLACK = 1.5  # a window's rows, as a multiple of what a holder gets under an even load
BLOCK = 8  # a window's rows are a multiple of it

Carry = TypeVar("Carry")


def choose(asked: str | None, devices: int, choices: int, itemsize: int) -> str:
    """The name of the exchange that moves fewer bytes between `devices` devices that hold different experts.

    For M tokens of D numbers on each device, a gather receives the tokens of all others, (P - 1) M D numbers, and sends
    as many float32 sums back. An all-to-all sends (P - 1) / P of k M D numbers there and as many back. So it is better
    where 2 k itemsize / P < itemsize + 4: in bfloat16 for k < 1.5 P. With gradients the limit is k < 1.4 P: five
    all-to-alls (tokens twice, results, both their gradients) against seven.
    """
    if asked is not None:
        return asked
    return "all_to_all" if 2 * choices * itemsize < devices * (itemsize + 4) else "gather"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where every slice starts and ends. Tables are [source, expert], the same on all devices."""

    begin_pE: jax.Array  # first row of a slice at its source
    rows_pE: jax.Array  # rows of a slice
    place_pE: jax.Array  # its first row in the holder's order: by expert, and for each expert by source
    window: int  # rows of a window
    axis: tuple[str, ...]
    everywhere: tuple[str, ...]

    @classmethod
    def of(cls, counts_E: jax.Array, tokens: int, choices: int, axis: tuple[str, ...], everywhere: tuple[str, ...]):
        """counts_E: rows of this device for each expert. tokens, choices: M and k of each device.

        axis: the mesh axes along which experts are split. everywhere: all axes of the mesh.
        """
        rows_pE = jax.lax.all_gather(counts_E, axis)
        (P, E), R = rows_pE.shape, tokens * choices
        at_holder_px = rows_pE.T.reshape(P, -1)
        place_pE = (jnp.cumsum(at_holder_px, axis=1) - at_holder_px).reshape(E, P).T
        window = -(-int(SLACK * R) // BLOCK) * BLOCK
        most = P * tokens * min(choices, E // P)  # rows that a holder can get: a token's experts differ
        begin_pE = jnp.cumsum(rows_pE, axis=1) - rows_pE
        return cls(begin_pE, rows_pE, place_pE, min(window, most), axis, everywhere)

    def over_rounds(self, do: Callable[["Round", Carry], Carry], carry: Carry) -> Carry:
        """do(round, carry) for as many rounds as the busiest holder needs."""
        P = len(self.rows_pE)
        rounds = jnp.max(-(-self.rows_pE.reshape(P, P, -1).sum(axis=(0, 2)) // self.window))
        # Other groups of devices could need fewer rounds, but every backend supports that all devices of a mesh run the
        # same collectives.
        rounds = jax.lax.pmax(rounds, self.everywhere)

        def one_round(state):
            return state[0] + 1, do(Round.of(self, state[0]), state[1])

        return jax.lax.while_loop(lambda state: state[0] < rounds, one_round, (jnp.int32(0), carry))[1]


@dataclasses.dataclass(frozen=True)
class Round:
    """One window of every holder's rows."""

    exchange: Exchange
    first: jax.Array  # row of the window, in the holder's order
    home_pE: jax.Array  # first row of the slice's part in this window, at its source
    there_pE: jax.Array  # first row of that part in the holder's window
    rows_pE: jax.Array  # number of rows of that part, usually 0 or the whole slice

    @classmethod
    def of(cls, exchange: Exchange, number: jax.Array) -> "Round":
        first = number * exchange.window
        in_window = lambda row_pE: jnp.clip(row_pE - first, 0, exchange.window)  # noqa: E731
        there_pE = in_window(exchange.place_pE)
        rows_pE = in_window(exchange.place_pE + exchange.rows_pE) - there_pE
        gone_pE = jnp.clip(first - exchange.place_pE, 0, exchange.rows_pE)
        return cls(exchange, first, exchange.begin_pE + gone_pE, there_pE, rows_pE)

    @property
    def group_sizes_E(self) -> jax.Array:
        """Rows of each expert of this device in its window, [E / P]."""
        return self._mine(self.rows_pE).sum(axis=0)

    def there(self, rows_rD: jax.Array) -> jax.Array:
        """The holder's window [c, D] from the sources' rows: rows sorted by expert, then zeros."""
        me, mine = self._me(), self._mine
        window_cD = jnp.zeros((self.exchange.window, rows_rD.shape[1]), rows_rD.dtype)
        return send(
            rows_rD, window_cD, self.home_pE[me], self.rows_pE[me], self.there_pE[me], mine(self.rows_pE).reshape(-1),
            axis=self.exchange.axis,
        )  # fmt: skip

    def back(self, rows_cD: jax.Array, into_rD: jax.Array) -> jax.Array:
        """`into_rD` of each source, with the rows of the holders' windows written back to where they came from."""
        me, mine = self._me(), self._mine
        return send(
            rows_cD, into_rD, mine(self.there_pE).reshape(-1), mine(self.rows_pE).reshape(-1),
            mine(self.home_pE).reshape(-1), self.rows_pE[me], axis=self.exchange.axis,
        )  # fmt: skip

    def numbers_there(self, numbers_r: jax.Array) -> jax.Array:
        """As `there` for one number per row, [c]. They are few: every device gathers all and picks its own."""
        all_pr = jax.lax.all_gather(numbers_r, self.exchange.axis)
        row_c = jnp.arange(self.exchange.window)
        starts_x, home_x = (self._mine(table).T.reshape(-1) for table in (self.there_pE, self.home_pE))
        slice_c = _last_start(starts_x, row_c)
        picked_c = all_pr[slice_c % len(all_pr), home_x[slice_c] + row_c - starts_x[slice_c]]
        return jnp.where(row_c < self.group_sizes_E.sum(), picked_c, 0)

    def numbers_back(self, numbers_c: jax.Array, into_r: jax.Array) -> jax.Array:
        """As `back` for one number per row."""
        all_pc = jax.lax.all_gather(numbers_c, self.exchange.axis)
        begin_E, place_E, rows_E = (
            table[self._me()] for table in (self.exchange.begin_pE, self.exchange.place_pE, self.exchange.rows_pE)
        )
        row_r = jnp.arange(len(into_r))
        expert_r = _last_start(begin_E, row_r)
        place_r = place_E[expert_r] + row_r - begin_E[expert_r] - self.first
        here_r = (row_r < rows_E.sum()) & (place_r >= 0) & (place_r < self.exchange.window)
        return jnp.where(here_r, all_pc[expert_r // (len(begin_E) // len(all_pc)), place_r], into_r)

    def _me(self) -> jax.Array:
        return jax.lax.axis_index(self.exchange.axis)

    def _mine(self, table_pE: jax.Array) -> jax.Array:
        """A table's columns of this device's experts, [P, E / P]."""
        P, E = table_pE.shape
        return jax.lax.dynamic_slice_in_dim(table_pE, self._me() * (E // P), E // P, axis=1)


def _last_start(starts_x: jax.Array, rows_y: jax.Array) -> jax.Array:
    """The slice that contains each row: the last one, of slices in ascending order, that starts at or before it."""
    return jnp.searchsorted(starts_x, rows_y, side="right", method="compare_all") - 1


def send(rows_xD, into_yD, from_s, sizes_s, to_s, come_s, *, axis: Sequence[str]) -> jax.Array:
    """jax.lax.ragged_all_to_all, also on CPU, where XLA lacks it.

    Each receiver gets equally many slices. Slice s is the rows from from_s[s] on, sizes_s[s] of them; the receiver
    writes them into its `into_yD` at to_s[s]. come_s: sizes of the slices that this device receives.
    """

    def ragged(rows_xD, into_yD, *slices):
        return jax.lax.ragged_all_to_all(rows_xD, into_yD, *slices, axis_name=axis)

    return jax.lax.platform_dependent(
        rows_xD, into_yD, from_s, sizes_s, to_s, come_s,
        cpu=lambda *args: _padded(*args[:-1], axis=axis), default=ragged,
    )  # fmt: skip


def _padded(rows_xD, into_yD, from_s, sizes_s, to_s, *, axis: Sequence[str]) -> jax.Array:
    """The same by an all-to-all of equal parts, each padded to the size of the receiver's whole array."""
    P, row_y = jax.lax.axis_size(axis), jnp.arange(len(into_yD))

    def part(begin_x, size_x, place_x):
        inside_yx = (row_y[:, None] >= place_x) & (row_y[:, None] < place_x + size_x)
        source_y = jnp.sum(jnp.where(inside_yx, begin_x + row_y[:, None] - place_x, 0), axis=1)
        return rows_xD[source_y], inside_yx.any(axis=1)

    parts = jax.vmap(part)(*(x_s.reshape(P, -1) for x_s in (from_s, sizes_s, to_s)))
    rows_pyD, real_py = (jax.lax.all_to_all(x, axis, 0, 0) for x in parts)
    sums_yD = jnp.sum(jnp.where(real_py[..., None], rows_pyD, 0), axis=0, dtype=into_yD.dtype)
    return jnp.where(real_py.any(axis=0)[:, None], sums_yD, into_yD)
