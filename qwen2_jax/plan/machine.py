# SPDX-License-Identifier: Apache-2.0
"""Machines by name: "v5p-256", "2xv5e-16", "8xh100", "2x8xh200", as devices to compile for and links between them."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax.errors import UserError
from qwen2_jax.parallel import sharding
from qwen2_jax.parallel.chips import CHIPS, Chip

ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "a100-80": "a100"}
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}  # v5e, v6e
SMALL = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}  # v4, v5p and tpu7x below one cube
CUBE = 4  # chips along each side of the blocks that larger 3D slices are made of; whole cubes close to a torus
LARGEST = 6144  # chips of a slice that one job can have, v5p
PER_NODE = 8  # GPUs
EXAMPLES = ("v5e-16", "v5p-256", "v6e-256", "2xv5p-256", "tpu7x-128", "h100", "8xh100", "2x8xh200")

# What XLA needs to know to compile for a GPU ahead of time. Hopper's numbers are the CUDA C++ Programming Guide's for
# compute capability 9.0, Ampere's for 8.0, Ada's for 8.9; clock and cache are the data sheets'.
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""
_HOPPER = {"major": 9, "minor": 0, "cores": 132, "fpus": 128, "shared": 233472, "optin": 232448, "threads": 2048,
           "cache": 50 * 2**20, "clock": 1.98}  # fmt: skip
_AMPERE = {"major": 8, "minor": 0, "cores": 108, "fpus": 64, "shared": 167936, "optin": 166912, "threads": 2048,
           "cache": 40 * 2**20, "clock": 1.41}  # fmt: skip
_ADA = {"major": 8, "minor": 9, "cores": 58, "fpus": 128, "shared": 102400, "optin": 101376, "threads": 1536,
        "cache": 48 * 2**20, "clock": 2.04}  # fmt: skip
GPUS = {"h100": _HOPPER, "h200": _HOPPER, "a100": _AMPERE, "a100-40": _AMPERE, "l4": _ADA}


@dataclasses.dataclass(frozen=True)
class Machine:
    """slices: number of TPU slices, or of nodes of GPUs, which a slower network connects. shape: chips of one slice
    along each side of its torus; (GPUs of a node,) for GPUs."""

    name: str
    chip: Chip
    slices: int
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of jax devices."""
        return self.slices * math.prod(self.shape) * self.chip.per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links along each side of the torus close to a ring."""
        if self.chip.dims == 2:
            return tuple(side == max(FLAT) ** 0.5 for side in self.shape)
        return (all(side % CUBE == 0 for side in self.shape),) * len(self.shape)

    def __str__(self) -> str:
        what = f"{self.devices} x {self.chip.kind}"
        if not self.chip.is_tpu:
            return what if self.slices == 1 else f"{what}, {self.slices} nodes of {self.shape[0]}"
        slices = "" if self.slices == 1 else f", {self.slices} slices"
        torus = "x".join(map(str, self.shape))
        closed = "torus" if all(self.wraps) else "mesh, partly closed" if any(self.wraps) else "mesh"
        return f"{what}{slices}, {torus} {closed}"


def parse(name: str) -> Machine:
    """The machine called `name`. Raises UserError with the nearest name, or with what is allowed."""
    text = name.strip().lower().replace("_", "-").replace(":", "-")
    names = sorted([*CHIPS, *ALIASES], key=len, reverse=True)
    match = re.fullmatch(rf"((?:\d+x)*)({'|'.join(map(re.escape, names))})(?:-([\dx]+))?", text)
    if match is None:
        raise UserError(f"no machine is called {name!r}{_nearest(text)}; {_allowed()}")
    counts = [int(count) for count in match[1].split("x") if count]
    chip = CHIPS[ALIASES.get(match[2], match[2])]
    if 0 in counts:
        raise UserError(f"{name!r} asks for 0 of something; {_allowed()}")
    if not chip.is_tpu:
        if match[3] or len(counts) > 2:
            raise UserError(
                f"{name!r}: GPUs are counted in front, as in 8x{chip.name} or 2x8x{chip.name} (nodes x GPUs)"
            )
        *nodes, gpus = counts or [1]
        if gpus > PER_NODE:
            better = f"{gpus // PER_NODE}x{PER_NODE}x{chip.name}" if gpus % PER_NODE == 0 else f"2x8x{chip.name}"
            raise UserError(f"{name!r}: a node has at most {PER_NODE} GPUs; give nodes x GPUs, as in {better}")
        return Machine(name, chip, nodes[0] if nodes else 1, (gpus,))
    if len(counts) > 1 or match[3] is None:
        raise UserError(f"{name!r}: give the size of a slice, as in {_sizes(chip)[2]}, and slices in front, as in "
                        f"2x{_sizes(chip)[2]}")  # fmt: skip
    slices = counts[0] if counts else 1
    shape = _given_shape(chip, match[3]) if "x" in match[3] else _usual_shape(chip, int(match[3]))
    if shape is None:
        raise UserError(f"{name!r}: there is no such slice; choose from {', '.join(_sizes(chip))}")
    return Machine(name, chip, slices, shape)


def mesh_of(machine: Machine, sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the machine's devices, laid out as in a run there (sharding.make_mesh).

    Raises UserError where the sizes do not multiply to the number of devices, the links do not allow the axes, or the
    compiler is not installed.
    """
    needed = math.prod(sizes.values())
    if needed != machine.devices or min(sizes.values()) < 1:
        raise UserError(
            f"mesh {dict(sizes)} is of {needed} devices; {machine.name} has {machine.devices}: the sizes' product must "
            f"be {machine.devices} (-1 takes the remaining devices)"
        )
    devices = _devices(machine.chip.name, machine.slices, machine.shape)
    assert len(devices) == machine.devices, (machine, len(devices))
    return sharding.lay_out(sizes, devices, machine.slices)


@functools.cache
def _devices(name: str, slices: int, shape: tuple[int, ...]) -> Sequence[Any]:
    """Devices of a machine for the compiler, as jax.experimental.topologies gives them."""
    from jax.experimental import topologies

    machine = Machine(name, CHIPS[name], slices, shape)
    chip = machine.chip
    _require(chip)
    jax.devices()  # registers the plugins
    sides = "x".join(map(str, machine.shape))
    if chip.is_tpu:
        # Harmless without a TPU: they keep libtpu from asking the cloud what machine this is, and from locking it.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        more: dict[str, Any] = {"num_slices": machine.slices} if machine.slices > 1 else {}
        if any(machine.wraps):
            more["wrap"] = (*machine.wraps, *[False] * (3 - len(machine.wraps)))
        if chip.name == "v4":  # two cores as one device
            more |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
        with _quiet():
            topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{sides}", **more)
    else:
        target = GPU_TARGET.format(
            kind=chip.kind, bandwidth=int(chip.hbm_gb_s * 1e9), memory=int(chip.peak.memory_gib * 2**30),
            **GPUS[chip.name],
        )  # fmt: skip
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=chip.name, target_config=target, topology=f"{machine.slices}x1x{sides}"
        )
    return topology.devices


def _require(chip: Chip) -> None:
    if chip.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"a plan for {chip.name} needs the TPU compiler, and no TPU: pip install 'qwen2-jax[tpu]' (in a clone: "
            'pip install -e ".[tpu]")'
        )
    plugins = importlib.util.find_spec("jax_plugins")
    if not chip.is_tpu and not (plugins and importlib.util.find_spec("jax_plugins.xla_cuda13")):
        raise UserError(
            f"a plan for {chip.name} needs the CUDA compiler, and no GPU: pip install 'qwen2-jax[cuda]' (in a clone: "
            'pip install -e ".[cuda]"; 1 GB instead of 4 with pip install --no-deps -r .ci/cuda-compiler.txt)'
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences stderr: libtpu reports there that it found no TPU, which is expected."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _given_shape(chip: Chip, text: str) -> tuple[int, ...] | None:
    shape = tuple(int(side) for side in text.split("x") if side)
    allowed = len(shape) == chip.dims and 0 not in shape
    if allowed and chip.dims == 2:
        allowed = shape in FLAT.values()
    elif allowed:
        cubes = all(side % CUBE == 0 for side in shape)
        allowed = (cubes or shape in SMALL.values()) and math.prod(shape) <= LARGEST
    return shape if allowed else None


def _usual_shape(chip: Chip, number: int) -> tuple[int, ...] | None:
    """The torus of a slice that is named by its size: the one nearest to a cube."""
    if chip.dims == 2:
        return FLAT.get(number)
    count, rest = divmod(number, 2 if chip.named_by_cores else 1)
    if rest or count in SMALL:
        return None if rest else SMALL[count]
    cubes, rest = divmod(count, CUBE**3)
    if rest or not cubes or count > LARGEST:
        return None
    shapes = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1) if cubes % a == 0
        for b in range(a, cubes // a + 1) if cubes // a % b == 0 and cubes // (a * b) >= b
    ]  # fmt: skip
    return tuple(CUBE * side for side in min(shapes, key=lambda shape: (sum(shape), max(shape))))


def _sizes(chip: Chip) -> list[str]:
    """Usual names of slices."""
    if chip.dims == 2:
        return [f"{chip.name}-{number}" for number in FLAT]
    per_chip = 2 if chip.named_by_cores else 1
    counts = [*(n for n in SMALL if n > 1), *(CUBE**3 * cubes for cubes in (1, 2, 4, 8, 16, 32))]
    return [f"{chip.name}-{count * per_chip}" for count in counts]


def _nearest(text: str) -> str:
    known = list(EXAMPLES)
    for chip in CHIPS.values():
        known += _sizes(chip) if chip.is_tpu else [f"{count}{chip.name}" for count in ("", "1x", "2x", "4x", "8x")]
    found = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _allowed() -> str:
    tpus = ", ".join(f"{_sizes(c)[0]} ... {_sizes(c)[-1]}" for c in CHIPS.values() if c.is_tpu)
    gpus = ", ".join(c.name for c in CHIPS.values() if not c.is_tpu)
    return (
        f"allowed are {tpus}, slices in front (2xv5p-256), and GPUs ({gpus}) as h100, 8xh100 or 2x8xh100 (nodes x GPUs)"
    )
