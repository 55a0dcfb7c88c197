# SPDX-License-Identifier: Apache-2.0
"""Peak rates and memory of every accelerator that jax may find, as data: the one table of them, of kernels and models.

A row is one jax device, which is one core of a TPU v2, v3 and v7x and the whole chip elsewhere. There is no row for a
CPU: what one can do depends on the machine around it more than on its name. Nothing here imports jax.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """What the maker promises for one jax device."""

    pattern: str  # the beginning of its device_kind
    tflops: float  # bfloat16 (float16 where there is none), dense, sums in float32, 10**12 per second
    memory_gib: float
    gb_s: float | None = None  # memory bandwidth, 10**9 bytes per second; None: no roofline or plan needs it yet


# Order matters: "TPU v5" alone is v5p, and a longer name comes before its beginning.
# TPUs: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}, tables "system architecture", divided by the devices
# of a chip.
# GPUs: NVIDIA's data sheets, dense tensor-core rates (half of those printed "with sparsity"); for GeForce cards the
# rate with sums in float32, from the architecture white papers (Turing to Blackwell).
PEAKS = (
    Peak(r"TPU v2", 22.5, 8),
    Peak(r"TPU v3", 61.5, 16),
    Peak(r"TPU v4", 275, 32, 1228),
    Peak(r"TPU v5 ?(lite|e)", 197, 16, 819),
    Peak(r"TPU v5", 459, 95, 2765),
    Peak(r"TPU v6", 918, 32, 1638),
    Peak(r"TPU ?v?7", 1153.5, 96, 3690),
    Peak(r"(NVIDIA )?Tesla V100.*32GB", 125, 32),  # float16
    Peak(r"(NVIDIA )?Tesla V100", 125, 16),  # float16
    Peak(r"(NVIDIA )?Tesla T4", 65, 16, 320),  # float16
    Peak(r"NVIDIA A100-\w+-40GB", 312, 40, 1555),
    Peak(r"NVIDIA A100.*80GB", 312, 80, 2039),  # the SXM board; PCIe has 1935 GB/s
    Peak(r"NVIDIA A10G", 70, 24),
    Peak(r"NVIDIA A10$", 125, 24),
    Peak(r"NVIDIA A30", 165, 24),
    Peak(r"NVIDIA A40", 150, 48),
    Peak(r"NVIDIA L4$", 121, 24, 300),
    Peak(r"NVIDIA L40S", 362, 48),
    Peak(r"NVIDIA H100 PCIe", 756, 80),
    Peak(r"NVIDIA H100 NVL", 835, 94),
    Peak(r"NVIDIA H100", 989, 80, 3350),
    Peak(r"NVIDIA H200 NVL", 835, 141),
    Peak(r"NVIDIA H200", 989, 141, 4800),
    Peak(r"NVIDIA GH200 480GB", 989, 96),
    Peak(r"NVIDIA B200", 2250, 180),
    Peak(r"NVIDIA GB200", 2500, 186),
    Peak(r"NVIDIA GeForce RTX 3090", 71, 24),
    Peak(r"NVIDIA GeForce RTX 4090", 165, 24),
    Peak(r"NVIDIA GeForce RTX 5090", 209, 32),
)


def peak_of(device_kind: str) -> Peak | None:
    """The row of what jax calls `device_kind`; None where there is none, and then there is no utilisation either."""
    return next((peak for peak in PEAKS if re.match(peak.pattern, device_kind)), None)
