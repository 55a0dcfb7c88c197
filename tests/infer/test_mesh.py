# SPDX-License-Identifier: Apache-2.0
"""Weights and cache spread over eight devices give what one device gives (in a process of its own)."""

import pytest

from few import slow
from worker import TESTS


def sizes(axes):
    return {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}


@pytest.mark.parametrize(
    ("variant", "axes"),
    slow(
        ("dense_untied", "data=2,fsdp=2,tensor=2"),
        ("moe", "data=2,expert=2,tensor=2"),
        ("sliding", "data=2,context=2,tensor=2"),
    ),
)
def test_sharded_model_answers_as_recorded(variant, axes, eight):
    """The same by another path: one device answers as recorded (tests/golden), and a mesh as one device (below)."""
    eight("eight_devices", "recorded", str(TESTS / "golden" / variant), sizes(axes))


MESHES = [
    ("sliding", "context=4,tensor=2"),
    *slow(("dense", "fsdp=8"), ("dense", "context=8"), ("sliding", "data=2,tensor=4")),
    *slow(("dca", "context=4,tensor=2"), ("dca", "data=2,fsdp=2,context=2")),
    *slow(("moe", "data=2,tensor=4"), ("moe", "expert=2,fsdp=2,tensor=2"), ("moe", "expert=2,context=2,tensor=2")),
]


@pytest.mark.parametrize(("name", "axes"), MESHES)
def test_a_mesh_answers_as_one_device(name, axes, eight):
    eight("eight_devices", "compare", name, sizes(axes))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *slow(("dense", "data=2,tensor=4"), ("sliding", "context=8")),
        *slow(("dca", "data=2,context=2,tensor=2"), ("moe", "expert=2,context=2,tensor=2")),
        ("dense", "fsdp=4,tensor=2"),
    ],
)
def test_neither_tables_nor_caches_move(name, axes, eight):
    """Nor weights, in decoding with fsdp. tests/plan asks the compilers for TPU and GPU."""
    eight("eight_devices", "collectives", name, sizes(axes))


@pytest.mark.slow  # quick: the mesh above, the flag in test_cli.py
def test_the_command_line_takes_a_mesh(eight):
    eight("eight_devices", "command_line", ["--mesh", "context=-1"])


@pytest.mark.slow  # quick: scales and heads in tests/weights/test_forms.py, int8 experts in tests/parallel
def test_int4_on_a_mesh(eight):
    """Routed experts and heads of 8 numbers in groups of 64: devices get parts of groups, with their scales."""
    eight("eight_devices", "quantised", "moe", sizes("expert=2,fsdp=2,tensor=2"), "int4")
