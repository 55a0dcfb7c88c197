# SPDX-License-Identifier: Apache-2.0
"""Memory use of a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

GIB = 2**30


def memory(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """{"memory_gib": now, "memory_peak_gib": since the start} of the fullest device of this host.

    Without memory statistics of the backend (CPU), the memory of the process. Empty if neither is known.
    """
    devices = jax.local_devices() if devices is None else devices
    stats = [device.memory_stats() for device in devices]
    if all(s and "bytes_in_use" in s for s in stats):
        used = [s["bytes_in_use"] for s in stats if s]
        peak = [s.get("peak_bytes_in_use", s["bytes_in_use"]) for s in stats if s]
        return {"memory_gib": max(used) / GIB, "memory_peak_gib": max(peak) / GIB}
    return _process()


def _process() -> dict[str, float]:
    """Resident memory of this process, on systems that report it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return {"memory_peak_gib": peak / GIB}
    return {"memory_gib": used / GIB, "memory_peak_gib": max(peak, used) / GIB}
