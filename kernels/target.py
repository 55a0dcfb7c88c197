# SPDX-License-Identifier: Apache-2.0
"""The device that a kernel is compiled for, and how its row in a table of block sizes is found."""

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

# Generations as jax's device_kind spells them. Order matters: "TPU v5" alone is v5p.
KINDS = {
    "v4": r"TPU v4",
    "v5e": r"TPU v5 ?(lite|e)",
    "v5p": r"TPU v5",
    "v6e": r"TPU v6",
    "v7x": r"TPU ?v?7",
    "hopper": r"NVIDIA (H\d+|GH\d+)",
}


class Target(NamedTuple):
    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # jax's device_kind: "TPU v5 lite", "NVIDIA H200"
    interpret: Any = False  # parameters of Pallas's interpreter, where a kernel runs in it; False to compile

    @property
    def generation(self) -> str:
        """Key of the tables of block sizes: "v5e", "v6e", "hopper", ..., or the kind itself where it is in no list."""
        return next((name for name, kind in KINDS.items() if re.match(kind, self.kind)), self.kind)


_SIMULATED: contextvars.ContextVar[Target | None] = contextvars.ContextVar("simulated", default=None)


@contextlib.contextmanager
def simulated(kind: str, interpret: Any) -> Iterator[None]:
    """While tracing inside, kernels are built for a device of `kind` and run in Pallas's interpreter.

    `interpret` are its parameters: a pltpu.InterpretParams for a TPU, an InterpretGPUParams for a GPU. A function that
    was traced outside and is cached by jit keeps the device that it was traced for.
    """
    token = _SIMULATED.set(Target("tpu" if kind.startswith("TPU") else "gpu", kind, interpret))
    try:
        yield
    finally:
        _SIMULATED.reset(token)


def target() -> Target:
    """The device of the mesh in context (another machine's when compiling ahead of time), or the default device."""
    if (simulation := _SIMULATED.get()) is not None:
        return simulation
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Target({"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform), device.device_kind)


class OtherPlatform(NotImplementedError):
    """The implementation is for another platform than the current device's."""


def require(platform: str, generations: tuple[str, ...] = ()) -> Target:
    """The target. Raises OtherPlatform, or NotImplementedError where it is of none of the generations given."""
    on = target()
    if on.platform != platform:
        raise OtherPlatform(f"needs a {platform}, this is a {on.platform} ({on.kind})")
    if generations and on.generation not in generations:
        wanted = " or ".join(generations)
        raise NotImplementedError(f"needs a {platform} of the generation {wanted}, this is a {on.kind}")
    return on


def block_sizes(table: Mapping[tuple[str, str], Mapping[str, int]], on: Target, shape_class: str) -> Mapping[str, int]:
    """The row of a table {(generation, shape class): sizes} for this device; generation "*" serves those not listed."""
    return table.get((on.generation, shape_class)) or table["*", shape_class]
