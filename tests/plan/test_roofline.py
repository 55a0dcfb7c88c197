# SPDX-License-Identifier: Apache-2.0
"""Seconds from counts: links of a torus and of a node, the network between them, rates in between two lengths."""

from types import SimpleNamespace

import numpy as np
import pytest

from qwen2_jax.parallel.chips import CHIPS
from qwen2_jax.plan.hlo import Collective
from qwen2_jax.plan.machine import parse
from qwen2_jax.plan.roofline import Network, Seconds, attention_rate, matmul_rate, traffic

GB = 10**9


def grid(name, **axes):
    """A machine and a mesh with devices in row-major order, as stand-ins for jax's."""
    machine = parse(name)
    places = np.ndindex(machine.slices, *machine.shape)
    devices = [SimpleNamespace(id=i, slice_index=s, coords=list(at)) for i, (s, *at) in enumerate(places)]
    mesh = SimpleNamespace(
        devices=np.array(devices, dtype=object).reshape(tuple(axes.values())), shape=axes, size=len(devices)
    )
    return machine, mesh


def collective(kind, members, size=GB, times=1):
    return Collective(kind, size, times, (tuple(members),))


def seconds(name, found, **axes):
    return Network(*grid(name, **axes)).seconds(found)


def test_links_of_a_torus():
    """v5p: 6 links of 100 GB/s each way, v5e: 4 of 50."""
    half = 0.5  # what one of two devices has not got yet
    assert seconds("v5p-256", collective("all-gather", range(128)), fsdp=128) == pytest.approx(
        127 / 128 / 600, rel=0.02
    )
    ring = collective("all-gather", range(8))  # the last side, 8 long, closed: 2 links
    assert seconds("v5p-256", ring, fsdp=16, tensor=8) == pytest.approx(7 / 8 / 200, rel=0.02)
    line = collective("all-gather", range(4))  # a side of 4 in a 4x4 mesh: its ends have one link
    assert seconds("v5e-16", line, fsdp=4, tensor=4) == pytest.approx(3 / 4 / 50, rel=0.02)
    corner = collective("reduce-scatter", range(16))
    assert seconds("v5e-16", corner, fsdp=16) == pytest.approx(15 / 16 / 100, rel=0.02)
    apart = collective("all-gather", (0, 8))  # every second chip of a closed side of 16: shares links with the others
    assert seconds("v5e-256", apart, fsdp=16, tensor=16) > half / 100
    both = collective("all-reduce", range(8))
    assert seconds("v5p-256", both, fsdp=16, tensor=8) == pytest.approx(2 * 7 / 8 / 200, rel=0.02)


def test_an_exchange_crosses_the_middle():
    exchange = collective("all-to-all", range(16))
    assert seconds("v5e-256", exchange, fsdp=16, tensor=16) == pytest.approx(16 / 8 / 50, rel=0.02)
    assert seconds("8xh100", collective("all-to-all", range(8)), fsdp=8) == pytest.approx(7 / 8 / 450, rel=0.02)


def test_nodes_and_slices_have_a_slower_network_between_them():
    """H100: 450 GB/s inside a node, and 8 cards of 50 GB/s for what comes from the other: together nearly as fast."""
    inside = collective("all-gather", range(8))
    assert seconds("2x8xh100", inside, data=2, fsdp=8) == pytest.approx(7 / 8 / 450, rel=0.02)
    everything = collective("all-gather", range(16))
    assert seconds("2x8xh100", everything, fsdp=16) == pytest.approx(15 / 16 / 450, rel=0.02)
    across = collective("all-reduce", (0, 8))  # one card each
    assert seconds("2x8xh100", across, data=2, fsdp=8) == pytest.approx(2 * 0.5 / 50, rel=0.02)
    exchange = collective("all-to-all", range(16))  # half of what each device puts in leaves the node, by its own card
    assert seconds("2x8xh100", exchange, fsdp=16) == pytest.approx(0.5 / 50, rel=0.02)
    slices = collective("all-reduce", (0, 4))
    assert seconds("2xv5p-8", slices, data=2, fsdp=4) == pytest.approx(2 * 0.5 / 6.25, rel=0.02)


def test_small_messages_take_a_hop_each():
    small = collective("all-reduce", range(8), size=1024, times=100)
    assert seconds("v5p-256", small, fsdp=16, tensor=8) == pytest.approx(100 * 2 * 4e-6, rel=0.05)
    assert seconds("8xh100", small, fsdp=8) == pytest.approx(100 * 2 * 10e-6, rel=0.05)
    assert seconds("8xh100", collective("all-reduce", [3]), fsdp=8) == 0


def test_traffic_is_added_up_by_kind_and_axes():
    machine, mesh = grid("8xh100", fsdp=4, tensor=2)
    gathers = [Collective("all-gather", GB, times, ((0, 2, 4, 6), (1, 3, 5, 7))) for times in (2, 3)]
    sums = [Collective("all-reduce", GB, 1, ((0, 1), (2, 3), (4, 5), (6, 7)))]
    first, second = traffic([*gathers, *sums], machine, mesh)
    assert (first.kind, first.axes, first.devices, first.times, first.bytes) == ("all-gather", ("fsdp",), 4, 5, 5 * GB)
    assert (second.kind, second.axes, second.devices) == ("all-reduce", ("tensor",), 2)


def test_what_bounds():
    assert Seconds(3.0, 1.0, 2.0).bound == "compute"
    assert (Seconds(3.0, 1.0, 2.0) + Seconds(0.0, 1.0, 2.0)).bound == "links"
    assert Seconds(3.0, 1.0, 2.0).hidden == 3 and Seconds(3.0, 1.0, 2.0).exposed == 6


def test_rates():
    v5p = CHIPS["v5p"]
    assert attention_rate(v5p, 128, 4096) == 222e12
    assert attention_rate(v5p, 128, 6144) == pytest.approx((222e12 + 286e12) / 2)
    assert attention_rate(v5p, 128, 100) == 97e12 and attention_rate(v5p, 64, 10**6) == 180e12
    assert matmul_rate(v5p) == pytest.approx(395e12)
    assert matmul_rate(CHIPS["a100"]) == 312e12  # nobody has published what is reached: the peak
