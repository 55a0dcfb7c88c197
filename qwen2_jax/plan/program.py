# SPDX-License-Identifier: Apache-2.0
"""A compiled function: memory per device, collectives and compile time; or the memory it needs if it does not fit."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax.plan import hlo
from qwen2_jax.weights.weight import part_bytes

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """bytes are per device. arguments: by kind, exact, from shapes and shardings. temporaries: everything that exists
    only while the program runs, laid out by the compiler. code: the program itself. padding: what the compiler's layout
    of the arguments takes beyond their numbers. known: False where the compiler refused the program for its size; then
    temporaries is what it says it needs, and there are no collectives."""

    name: str
    arguments: Mapping[str, int]
    padding: int
    temporaries: int
    code: int
    collectives: tuple[hlo.Collective, ...]
    lower_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float  # of all cores together
    known: bool = True

    @property
    def bytes(self) -> int:
        """Bytes per device in all."""
        return sum(self.arguments.values()) + self.padding + self.temporaries + self.code


def compiled(name: str, lower: Callable[[], tuple[jax.stages.Lowered, Mapping[str, Any]]], mesh: Mesh) -> Program:
    """Lowers and compiles a function for the devices of a mesh.

    lower: returns the lowered function and its arguments by kind, trees of jax.ShapeDtypeStruct with shardings.
    """
    begin = time.perf_counter()
    lowered, arguments = lower()
    between, cpu = time.perf_counter(), _cpu_seconds()
    given = {kind: device_bytes(tree) for kind, tree in arguments.items()}
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = refused(str(error))
        if needed is None:
            raise
        took = time.perf_counter() - between, _cpu_seconds() - cpu
        # The compiler counts the temporaries alone, or everything: whichever it was, no less than that is needed.
        temporaries = max(needed - sum(given.values()), 0)
        return Program(name, given, 0, temporaries, 0, (), between - begin, *took, known=False)
    took = time.perf_counter() - between, _cpu_seconds() - cpu
    memory, text = executable.memory_analysis(), executable.as_text()
    assert memory is not None
    assert text is not None
    outside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        name,
        given,
        max(0, memory.argument_size_in_bytes - sum(given.values())),
        memory.temp_size_in_bytes + max(0, outside),
        memory.generated_code_size_in_bytes,
        tuple(hlo.collectives(text, [device.id for device in mesh.devices.flat])),
        between - begin,
        *took,
    )


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its child processes that have ended, such as XLA:GPU's assembler."""
    return sum(os.times()[:4])


def refused(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's message that refuses it for its size; None for other messages."""
    match = re.search(r"\((\d+(?:\.\d+)?)([KMGT]?)\) exceeds available HBM", message)
    match = match or re.search(r"Used (\d+(?:\.\d+)?)([KMGT]?) of \S+ hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return int(float(match[1]) * UNITS[match[2]])


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on the device that holds most."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        part = leaf.shape if getattr(leaf, "sharding", None) is None else leaf.sharding.shard_shape(leaf.shape)
        total += part_bytes(jax.ShapeDtypeStruct(part, leaf.dtype))
    return total
