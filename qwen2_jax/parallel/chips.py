# SPDX-License-Identifier: Apache-2.0
"""Accelerators that a plan can be made for, as data: memory, links, networks, and the rates that have been reached.

A row is one jax device, which is one core of a TPU v7x and the whole chip elsewhere. Its peak rate, memory and
bandwidth are in its row of `PEAKS`, the table of every device that jax may find (kernels/peaks.py).
"""

from collections.abc import Mapping
from typing import NamedTuple

from qwen2_jax.kernels.peaks import PEAKS, Peak, peak_of

__all__ = ["CHIPS", "PEAKS", "Chip", "Peak", "peak_of"]


class Chip(NamedTuple):
    """One jax device and how it is connected; bandwidths in 10**9 bytes per second and one direction."""

    name: str  # as machines are named: "v5p" in v5p-256, "h100" in 8xh100
    kind: str  # jax's device_kind, which leads to its row in PEAKS
    int8_tops: float | None  # dense, 10**12 per second; None: not published
    fp8_tflops: float | None  # None: the chip has no fp8 products, or none faster than bfloat16
    usable_gib: float  # of its memory, what one program can have; see below
    links: int  # to neighbouring chips (TPU), to the switch of its node (GPU: 1); they belong to a whole chip
    link_gb_s: float  # each of them
    network_gb_s: float  # its share of what leaves a slice (TPU) or a node (GPU)
    hop_us: float  # microseconds that a message takes at least, per neighbour (TPU) or per collective (GPU)
    matmul_share: float | None  # of the peak, reached by the fastest large product published; None: none is
    attention_tflops: Mapping[int, Mapping[int, float]]  # head width -> length -> causal attention, forward
    dims: int = 0  # of the torus (TPU); 0: a switch connects all devices of a node
    per_chip: int = 1  # jax devices on a chip
    named_by_cores: bool = False  # whether v5p-256 counts TensorCores (two per chip) and not chips

    @property
    def peak(self) -> Peak:
        """Its row in PEAKS."""
        found = peak_of(self.kind)
        assert found is not None, self.kind
        return found

    @property
    def hbm_gb_s(self) -> float:
        """Bandwidth of its memory."""
        assert self.peak.gb_s is not None, self.kind
        return self.peak.gb_s

    @property
    def is_tpu(self) -> bool:
        return self.dims > 0


# Where the numbers come from.
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "system architecture": int8 and fp8 rates,
#   and "bidirectional ICI bandwidth per chip", which is links x 2 x link_gb_s (v5e 400, v5p 1200, v6e 800, TPU7x 1200
#   GB/s; v4: 50 GB/s a link, Jouppi et al. 2023, arXiv:2304.01433). network_gb_s: "DCN bandwidth per chip" (v5p 50, v6e
#   100, TPU7x 100 Gbit/s), for v5e from the network cards of a host (200 Gbit/s for 8 chips), for v4 as v5p.
#   usable_gib: what libtpu 0.0.50 says it has when it refuses a program that is too large. hop_us: about a microsecond
#   (Austin et al. 2025, jax-ml.github.io/scaling-book, chapter 3).
# GPU: NVIDIA's data sheets of A100 SXM, H100 SXM5, H200 SXM and L4: int8 and fp8 without sparsity, NVLink (600
#   and 900 GB/s both ways together; an L4 has PCIe 4.0 x16). network_gb_s: one network card per GPU as in DGX A100 (200
#   Gbit/s) and DGX H100 (400 Gbit/s). usable_gib: 95% of what nvidia-smi shows, for
#   XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. hop_us: an assumption for a small NCCL collective, not a measurement of ours.
# matmul_share and attention_tflops: timings in the tuning caches of tokamax 0.0.17, and MaxText's and tokamax's
#   documents (v6e 8192^3 754 to 827 TFLOP/s, TPU7x 956 of 1153, H100 650 to 700 of 989; v5e and v5p the best grouped
#   products, 183 and 395), bfloat16. Attention: causal, the masked half not counted. v4 and v5e have no published
#   attention of this kind: theirs is v5p's share of the peak. A100's is FlashAttention-2's, forward and backward pass
#   together, and L4's is A100's share of the peak.
_V5P_128 = {1024: 97.0, 2048: 163.0, 4096: 222.0, 8192: 286.0, 16384: 343.0}
_V5P_64 = {4096: 124.0, 8192: 153.0, 16384: 180.0}
_A100_128 = {1024: 133.0, 2048: 155.0, 4096: 173.0, 8192: 182.0, 16384: 189.0}
_A100_64 = {1024: 119.0, 2048: 140.0, 4096: 156.0, 8192: 165.0, 16384: 171.0}
_HOPPER_128 = {1024: 388.0, 4096: 568.0, 8192: 620.0, 16384: 637.0}
_HOPPER_64 = {1024: 274.0, 4096: 413.0, 8192: 465.0, 16384: 502.0}


def _scaled(rates: Mapping[int, float], share: float) -> dict[int, float]:
    return {length: rate * share for length, rate in rates.items()}


_V5P, _HOPPER = {128: _V5P_128, 64: _V5P_64}, {128: _HOPPER_128, 64: _HOPPER_64}
_A100 = {128: _A100_128, 64: _A100_64}
_V4 = {width: _scaled(rates, 275 / 459) for width, rates in _V5P.items()}
_V5E = {width: _scaled(rates, 197 / 459) for width, rates in _V5P.items()}
_V6E = {
    128: {1024: 78.0, 2048: 120.0, 4096: 174.0, 8192: 226.0, 16384: 276.0},
    64: {4096: 105.0, 8192: 127.0, 16384: 148.0},
}
_V7X = {
    128: {1024: 95.0, 2048: 147.0, 4096: 203.0, 8192: 257.0, 16384: 307.0},
    64: {4096: 113.0, 8192: 135.0, 16384: 158.0},
}
_L4 = {width: _scaled(rates, 121 / 312) for width, rates in _A100.items()}

CHIPS = {
    chip.name: chip
    for chip in (
        # name, kind, int8, fp8, usable, links, each, network, hop, matmul, attention
        Chip("v4", "TPU v4", 275, None, 30.75, 6, 50, 6.25, 1.0, None, _V4, 3, named_by_cores=True),
        Chip("v5e", "TPU v5 lite", 393, None, 15.75, 4, 50, 3.125, 1.0, 183 / 197, _V5E, 2),
        Chip("v5p", "TPU v5", 918, None, 95.73, 6, 100, 6.25, 1.0, 395 / 459, _V5P, 3, named_by_cores=True),
        Chip("v6e", "TPU v6 lite", 1836, None, 31.24, 4, 100, 12.5, 1.0, 827 / 918, _V6E, 2),
        Chip("tpu7x", "TPU7x", None, 2307, 94.74, 6, 100, 6.25, 1.0, 956 / 1153, _V7X, 3, 2, named_by_cores=True),
        Chip("a100-40", "NVIDIA A100-SXM4-40GB", 624, None, 38.0, 1, 300, 25, 10.0, None, _A100),
        Chip("a100", "NVIDIA A100-SXM4-80GB", 624, None, 76.0, 1, 300, 25, 10.0, None, _A100),
        Chip("h100", "NVIDIA H100 80GB HBM3", 1979, 1979, 75.67, 1, 450, 50, 10.0, 675 / 989, _HOPPER),
        Chip("h200", "NVIDIA H200", 1979, 1979, 133.4, 1, 450, 50, 10.0, 675 / 989, _HOPPER),
        Chip("l4", "NVIDIA L4", 242, 242, 21.4, 1, 32, 12.5, 20.0, None, _L4),
    )
}
