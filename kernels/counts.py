# SPDX-License-Identifier: Apache-2.0
"""FLOPs, bytes and fast memory of one call of a kernel, counted from the kernel's own visit list and buffers.

The kernels of a device are the modules tpu.py and gpu.py of an operation. Each has a function `count` that builds the
visit list and block sizes as a call does, and adds up what the grid would do with them. Here the results are brought to
one form.
"""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from .chip_limits import Chip

PLATFORMS = {"tpu": ("v4", "v5e", "v5p", "v6e", "v7x"), "gpu": ("hopper",)}
ATTENTION = ("B", "T", "S", "N", "K", "H")


class Count(NamedTuple):
    """Work of one call, counted from the lists, the grid and the buffers that the kernel uses."""

    flops: int
    hbm_bytes: int
    fast_memory_bytes: int  # at one time: VMEM of a core, shared memory of a program


def count(operation: str, implementation: str, shape: Mapping[str, int], sizes_E, dtype, chip: Chip) -> dict:
    """{pass: Count}, for the passes that the kernel counts. `sizes_E` are each expert's rows, or None.

    Raises NotImplementedError where the implementation has no count, or none for this chip or dtype.
    """
    on = chip.on
    if implementation not in PLATFORMS:
        raise NotImplementedError("has no list of visits of its own to count")
    if on.platform != implementation or on.generation not in PLATFORMS[implementation]:
        raise NotImplementedError(f"runs on {', '.join(PLATFORMS[implementation])}, not on {chip.name}")
    if implementation == "gpu" and dtype != jnp.bfloat16:
        raise NotImplementedError("takes bfloat16")
    if operation in ("flash_attention", "dual_chunk_attention"):  # one kernel: a list of one rotation, or of three
        given: dict[str, Any] = {name: shape.get(name) for name in ("chunk_len", "window")}
        given |= {"dtype": dtype} if implementation == "tpu" else {}
        return _by_pass(_kernel("dual_chunk_attention", implementation).count(*_sizes(shape), on=on, **given))
    if operation == "decode_attention":
        given = {name: shape.get(name) for name in ("chunk_len", "window", "page")} | {"dtype": dtype}
        given |= {"cache_dtype": jnp.int8} if shape.get("int8") else {}
        return _by_pass(_kernel(operation, implementation).count(*_sizes(shape), on=on, **given))
    if operation == "weight_only_matmul":
        given = {"bits": shape["bits"], "offset": bool(shape.get("offset"))}
        given |= {"dtype": dtype} if implementation == "tpu" else {}
        M, O, I = (shape[x] for x in "MOI")
        return _by_pass(_kernel(operation, implementation).count(M, O, I, I // shape["group"], on=on, **given))
    if operation == "grouped_weight_only":
        M, E, D, F = (shape[x] for x in "MEDF")
        given = {"dtype": dtype} if implementation == "tpu" else {}
        form = _kernel("grouped_matmul", "integers").Form(shape["bits"], shape.get("group"), bool(shape.get("offset")))
        counted = _kernel("grouped_matmul", implementation).count_integers
        return _by_pass(counted(M, E, D, F, on=on, form=form, group_sizes_E=sizes_E, **given))
    return _grouped(implementation, shape, sizes_E, 2 if operation == "grouped_swiglu" else 1, on, dtype)


def _kernel(folder: str, platform: str):
    return importlib.import_module(f".{folder}.{platform}", __package__)


def _sizes(shape):
    return (shape[letter] for letter in ATTENTION)


def _by_pass(counted):
    return counted if isinstance(counted, dict) else {"forward": counted}


def _grouped(implementation, shape, sizes_E, matrices, on, dtype):
    M, E, D, F = (shape[x] for x in "MEDF")
    kernel = _kernel("grouped_matmul", implementation)
    if implementation == "gpu":
        names = ("forward", "backward", "step")
        return {x: kernel.count(M, E, D, F, on=on, matrices=matrices, which=x, group_sizes_E=sizes_E) for x in names}
    item = jnp.dtype(dtype).itemsize
    parts = kernel.count(M, D, F, sizes_E, on=on, itemsize=item, swiglu=matrices == 2)
    forward = parts.pop("forward")
    kept = parts.pop("forward, keeping g and u", forward)
    # From g, u and dh to dg and du, in plain XLA: five arrays of M x F, no products.
    backward = [*parts.values(), *([Count(0, 5 * M * F * item, 0)] if matrices == 2 else [])]
    return {"forward": forward, "backward": added(*backward), "step": added(kept, *backward)}


def added(*counts) -> Count:
    """The work of kernels that run one after another."""
    flops, hbm_bytes = sum(x.flops for x in counts), sum(x.hbm_bytes for x in counts)
    return Count(flops, hbm_bytes, max(x.fast_memory_bytes for x in counts))
