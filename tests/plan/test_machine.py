# SPDX-License-Identifier: Apache-2.0
"""Names of machines, what a typo is answered with, and meshes over their devices."""

import importlib.util

import numpy as np
import pytest
from qwen2_jax.kernels.chip_limits import CHIPS as KERNEL_CHIPS

from ahead_of_time import GPU_COMPILER, TPU_COMPILER
from qwen2_jax.errors import UserError
from qwen2_jax.parallel.chips import CHIPS, peak_of
from qwen2_jax.plan.machine import mesh_of, parse


@pytest.mark.parametrize(
    ("name", "chip", "slices", "shape", "devices"),
    [
        ("v5e-16", "v5e", 1, (4, 4), 16),
        ("v5litepod-16", "v5e", 1, (4, 4), 16),
        ("v6e-256", "v6e", 1, (16, 16), 256),
        ("v5p-8", "v5p", 1, (2, 2, 1), 4),
        ("v5p-256", "v5p", 1, (4, 4, 8), 128),  # cores in the name, chips in the torus
        ("V5P-768", "v5p", 1, (4, 8, 12), 384),
        ("v5p-4x4x8", "v5p", 1, (4, 4, 8), 128),
        ("v5p:2x2x2", "v5p", 1, (2, 2, 2), 8),
        ("2xv5p-256", "v5p", 2, (4, 4, 8), 256),
        ("tpu7x-128", "tpu7x", 1, (4, 4, 4), 128),  # two devices on each chip
        ("v4-16", "v4", 1, (2, 2, 2), 8),
        ("h100", "h100", 1, (1,), 1),
        ("8xh100", "h100", 1, (8,), 8),
        ("2x8xh200", "h200", 2, (8,), 16),
        ("4xa100-40", "a100-40", 1, (4,), 4),
    ],
)
def test_names(name, chip, slices, shape, devices):
    machine = parse(name)
    assert (machine.chip.name, machine.slices, machine.shape, machine.devices) == (chip, slices, shape, devices)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p256", "did you mean v5p-256"),
        ("8xh10", "did you mean 8xh100"),
        ("v6-256", "did you mean v6e-256"),
        ("banana", "allowed are"),
        ("v5e-17", "choose from v5e-1, v5e-4, v5e-8"),
        ("v5p-257", "choose from v5p-8"),
        ("v5p-3x3x3", "choose from v5p-8"),
        ("v5p", "give the size of a slice"),
        ("16xh100", "as in 2x8xh100"),
        ("h100-8", "counted in front"),
        ("0xh100", "0 of something"),
    ],
)
def test_mistakes_say_what_is_allowed(name, says):
    with pytest.raises(UserError, match=says):
        parse(name)


def test_a_torus_closes_where_it_is_whole():
    assert parse("v5e-256").wraps == (True, True)
    assert parse("v5e-128").wraps == (False, True)
    assert parse("v5p-256").wraps == (True, True, True)
    assert parse("v5p-64").wraps == (False, False, False)


def test_a_mesh_has_the_machine_s_number_of_devices():
    with pytest.raises(UserError, match="product must be 8"):
        mesh_of(parse("8xh100"), {"fsdp": 4, "tensor": 4})


@pytest.mark.parametrize(("name", "extra"), [("v5e-4", "[tpu]"), ("h100", "[cuda]")])
def test_a_missing_compiler_is_named_with_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    machine = parse("v5e-8" if name == "v5e-4" else "2xh200")  # not made before: devices are kept
    with pytest.raises(UserError) as error:
        mesh_of(machine, {"fsdp": machine.devices})
    assert extra in str(error.value)


def test_chips_agree_with_those_of_the_kernels():
    """Both read kernels/peaks.py; what each adds to it fits."""
    for chip in CHIPS.values():
        assert peak_of(chip.kind) is chip.peak
        twin = next((c for c in KERNEL_CHIPS.values() if c.kind == chip.kind), None)
        if twin is not None:
            assert chip.hbm_gb_s * twin.devices == twin.gb_s
            assert chip.per_chip == twin.devices
        assert chip.usable_gib < chip.peak.memory_gib * 1.02
        assert chip.matmul_share is None or 0.5 < chip.matmul_share < 1
        for rates in chip.attention_tflops.values():
            assert max(rates.values()) < chip.peak.tflops


@pytest.mark.parametrize("_", [pytest.param(0, marks=TPU_COMPILER)])
def test_tpu_meshes(_):
    mesh = mesh_of(parse("v5e-16"), {"data": 1, "fsdp": 4, "tensor": 4, "expert": 1})
    rows = {tuple(sorted(d.coords[1] for d in row)) for row in mesh.devices[0, :, :, 0]}
    columns = {tuple(sorted(d.coords[0] for d in row)) for row in mesh.devices[0, :, :, 0]}
    assert len(rows) == 4 or len(columns) == 4  # one side of the torus per axis
    with pytest.raises(UserError, match="be a side of the torus"):
        mesh_of(parse("v5p-256"), {"fsdp": 64, "tensor": 2})
    two = mesh_of(parse("2xv5p-16"), {"data": 1, "fsdp": 8, "tensor": 2})
    slices = np.vectorize(lambda d: d.slice_index)(two.devices)
    assert (slices[0, :4] == 0).all() and (slices[0, 4:] == 1).all()  # fsdp goes across, tensor stays inside


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_gpu_meshes(_):
    mesh = mesh_of(parse("2x8xh100"), {"data": 2, "fsdp": 4, "tensor": 2, "expert": 1})
    assert [d.id for d in mesh.devices.flat] == list(range(16))  # data goes across the nodes
    assert mesh.abstract_mesh.abstract_device.device_kind == "NVIDIA H100 80GB HBM3"
