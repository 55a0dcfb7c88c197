# SPDX-License-Identifier: Apache-2.0
"""The rooflines of whole chips: peak rates (peaks.py), fast memory and cores, as data.

No kernel reaches these numbers, and makers print them for a chip that is cool and at its full clock. They are for
dividing by: a kernel needs at least FLOPs / peak seconds and at least bytes / bandwidth seconds, whichever is longer.
There is no row for a CPU: what one can do depends on the machine around it more than on its name.
"""

import re
from typing import NamedTuple

from .peaks import Peak, peak_of
from .target import KINDS, Target

KIB, MIB = 2**10, 2**20


class Chip(NamedTuple):
    """One whole chip. `devices` is how many jax devices it appears as; each of them has its share."""

    name: str
    kind: str  # what jax calls the device, as an example
    pattern: str  # the beginning of all names that jax has for it
    fast_bytes: int  # VMEM of a core (TPU), shared memory that a block can have (GPU)
    cores: int  # TensorCores, streaming multiprocessors
    devices: int = 1

    @property
    def _peak(self) -> Peak:
        """The peak of each of its devices."""
        found = peak_of(self.kind)
        assert found is not None, self.kind
        return found

    @property
    def tflops(self) -> float:
        """bfloat16, dense, sums in float32, 10**12 per second."""
        return self._peak.tflops * self.devices

    @property
    def gb_s(self) -> float:
        """Bandwidth of its HBM, 10**9 bytes per second."""
        assert self._peak.gb_s is not None, self.kind
        return self._peak.gb_s * self.devices

    @property
    def on(self) -> Target:
        """The chip as a target of compilation."""
        return Target("tpu" if self.kind.startswith("TPU") else "gpu", self.kind)

    def seconds(self, flops: float, hbm_bytes: float) -> tuple[float, str]:
        """(the least time that one jax device needs, "compute" or "memory": what it waits for)."""
        compute = flops * self.devices / (self.tflops * 1e12)
        memory = hbm_bytes * self.devices / (self.gb_s * 1e9)
        return max(compute, memory), "compute" if compute > memory else "memory"


# TPUs: cores from cloud.google.com/tpu/docs, VMEM from jax's table of TPUs (jax/_src/tpu_info.py). v4 and v5p have two
# cores that work as one device, v7x has two that are two devices.
# GPUs: NVIDIA's data sheets of A100 (SXM), H100 SXM5 and H200 SXM; shared memory from the tables of compute capability
# 8.0 and 9.0 in the CUDA C++ Programming Guide.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", KINDS["v4"] + "$", 16 * MIB, 2),
        Chip("v5e", "TPU v5 lite", KINDS["v5e"], 128 * MIB, 1),
        Chip("v5p", "TPU v5", KINDS["v5p"], 64 * MIB, 2),
        Chip("v6e", "TPU v6 lite", KINDS["v6e"], 128 * MIB, 1),
        Chip("v7x", "TPU7x", KINDS["v7x"], 64 * MIB, 2, devices=2),
        Chip("a100-40", "NVIDIA A100-SXM4-40GB", r"NVIDIA A100-\w+-40GB", 163 * KIB, 108),
        Chip("a100-80", "NVIDIA A100-SXM4-80GB", r"NVIDIA A100-SXM\d-80GB", 163 * KIB, 108),
        Chip("h100", "NVIDIA H100 80GB HBM3", r"NVIDIA H100 80GB HBM3", 227 * KIB, 132),
        Chip("h200", "NVIDIA H200", r"NVIDIA H200$", 227 * KIB, 132),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None if it is not in the table (a CPU, a PCIe card, something newer)."""
    return next((chip for chip in CHIPS.values() if re.match(chip.pattern, device_kind)), None)
