# SPDX-License-Identifier: Apache-2.0
"""Roofline: lower bounds of the seconds that chips, their memory and their links need, from counts of FLOPs and bytes.

A collective takes as long as the device that has to take in the most bytes through the fewest links; the smallest ones
take a hop's time instead. Arithmetic is counted at the rates that published kernels reach, not at the peak, because no
program runs at the peak. docs/scaling.md has the formulas, their sources and how far off they are.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import Mesh

from qwen2_jax.parallel.chips import Chip
from qwen2_jax.plan.hlo import Collective
from qwen2_jax.plan.machine import Machine


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of one run of a program on every device: arithmetic, memory traffic, messages (each as if alone)."""

    compute: float
    memory: float
    links: float

    @property
    def hidden(self) -> float:
        """Where all three overlap: the longest of them."""
        return max(self.compute, self.memory, self.links)

    @property
    def exposed(self) -> float:
        """Where nothing overlaps: their sum."""
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        """The bottleneck: "compute", "memory" or "links"."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.compute + other.compute, self.memory + other.memory, self.links + other.links)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(self.compute * times, self.memory * times, self.links * times)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    devices: int  # that take part in one of them
    times: int
    bytes: int  # of the arrays, as Collective.bytes, in all
    seconds: float


def traffic(collectives: Iterable[Collective], machine: Machine, mesh: Mesh) -> list[Traffic]:
    """Collectives added up by kind and mesh axes, the slowest first."""
    network = Network(machine, mesh)
    found: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for collective in collectives:
        axes = collective.axes(mesh.shape)
        members = collective.group_size if collective.groups else math.prod(mesh.shape[axis] for axis in axes)
        row = found.setdefault((collective.kind, axes, members), [0, 0, 0.0])
        row[0] += collective.times
        row[1] += collective.bytes * collective.times
        row[2] += network.seconds(collective)
    rows = [Traffic(*key, times=int(n), bytes=int(size), seconds=s) for key, (n, size, s) in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


class Network:
    """The links between a mesh's devices."""

    def __init__(self, machine: Machine, mesh: Mesh):
        self.machine, self.chip = machine, machine.chip
        devices = list(mesh.devices.flat)
        per_slice = len(devices) // machine.slices
        # (slice or node, position in it); a TPU's position is its chip's coordinates.
        if self.chip.is_tpu:
            self.at = [(getattr(d, "slice_index", None) or 0, tuple(d.coords)) for d in devices]
        else:
            self.at = [(d.id // per_slice, (d.id % per_slice,)) for d in devices]
        self._links = functools.cache(self._links_of)

    def seconds(self, collective: Collective) -> float:
        """Seconds that all `times` runs of a collective take."""
        members = collective.groups[0] if collective.groups else collective.pairs[0] if collective.pairs else ()
        if len(set(members)) < 2:
            return 0.0
        if collective.kind == "collective-permute":
            return self._permute(collective)
        links, longest, wraps, hops = self._links(tuple(members))
        across = len({self.at[m][0] for m in members})
        rate = links * self.chip.link_gb_s * 1e9
        exchange = collective.kind in ("all-to-all", "ragged-all-to-all")
        if exchange and self.chip.is_tpu:
            # Everything crosses the middle of the longest side: n/4 hops on average along a ring, n/3 on a line.
            inside = collective.bytes * longest / ((8 if wraps else 4) * self.chip.link_gb_s * 1e9)
        else:
            inside = collective.received / collective.times / rate
        passes = 2 if collective.kind == "all-reduce" else 1
        between = 0.0
        if across > 1:
            here = 1 if exchange else len(members) / across  # in an exchange each device receives its own data
            share = collective.bytes * (across - 1) / across
            between = passes * share / (here * self.chip.network_gb_s * 1e9)
        return collective.times * (max(inside, between) + passes * hops * self.chip.hop_us * 1e-6)

    def _permute(self, collective: Collective) -> float:
        """XLA sends the halves of a ring's step both ways at once, as two permutations; each counts with both links."""
        across = any(self.at[a][0] != self.at[b][0] for a, b in collective.pairs)
        rate = self.chip.network_gb_s if across else self.chip.link_gb_s * (2 if self.chip.is_tpu else 1)
        return collective.times * (collective.bytes / (rate * 1e9) + self.chip.hop_us * 1e-6)

    def _links_of(self, members: Sequence[int]) -> tuple[float, int, bool, int]:
        """(links by which the member with the fewest receives, longest side, whether that side is a ring, hops)."""
        if not self.chip.is_tpu:
            nodes = len({self.at[m][0] for m in members})
            return 1.0, len(members), False, nodes
        slices = {self.at[m][0] for m in members}
        first = min(slices)
        chips = {self.at[m][1] for m in members if self.at[m][0] == first}
        sides = [len({chip[dim] for chip in chips}) for dim in range(len(self.machine.shape))]
        closed = [
            side == whole and wraps
            for side, whole, wraps in zip(sides, self.machine.shape, self.machine.wraps, strict=True)
        ]
        longest = max(range(len(sides)), key=lambda dim: sides[dim])
        hops = sum(side // 2 if ring else side - 1 for side, ring in zip(sides, closed, strict=True))
        if len(chips) == 1:  # two devices of one chip
            return float(self.chip.links), 1, False, 1
        worst = min(sum(near in chips for near in self._neighbours(chip)) for chip in chips)
        # Members that are not neighbours share the links on the way with those in between.
        return (
            float(worst) or 1 / max(1, -(-self.machine.shape[longest] // sides[longest])),
            sides[longest],
            closed[longest],
            hops,
        )

    def _neighbours(self, chip: Sequence[int]) -> set[tuple[int, ...]]:
        near = set()
        for dim, (side, wraps) in enumerate(zip(self.machine.shape, self.machine.wraps, strict=True)):
            for step in (-1, 1):
                position = chip[dim] + step
                if wraps or 0 <= position < side:
                    near.add((*chip[:dim], position % side, *chip[dim + 1 :]))
        return near - {tuple(chip)}


def matmul_rate(chip: Chip) -> float:
    """Operations per second of one device in large products: the peak if no reached rate is published."""
    return chip.peak.tflops * 1e12 * (chip.matmul_share or 1.0)


def attention_rate(chip: Chip, head_dim: int, length: int) -> float:
    """Operations per second of one device in causal attention over sequences of this length, forward.

    Read off the chip's table at the nearest head width and, in between two lengths, along a straight line.
    """
    table: Mapping[int, float] = chip.attention_tflops[128 if head_dim > 64 else 64]
    lengths = sorted(table)
    if length <= lengths[0]:
        return table[lengths[0]] * 1e12
    for low, high in itertools.pairwise(lengths):
        if length <= high:
            return (table[low] + (table[high] - table[low]) * (length - low) / (high - low)) * 1e12
    return table[lengths[-1]] * 1e12
