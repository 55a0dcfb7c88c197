# SPDX-License-Identifier: Apache-2.0
"""Checks that a model and its cache fit in free memory, before anything is loaded."""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model import decoder, flops
from qwen2_jax.weights import forms
from qwen2_jax.weights.params import Tree


def free_bytes(devices: Iterable[jax.Device] | None = None) -> int | None:
    """Bytes that can still be allocated on the devices together, or None where the backend does not report it."""
    devices = list(devices or jax.local_devices())
    if devices[0].platform == "cpu":
        return _host_free_bytes()
    stats = [device.memory_stats() for device in devices]
    if not all(s and "bytes_limit" in s for s in stats):
        return None
    return sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


def check_load(config: ModelConfig, *, rows: int, length: int, dtype, cache_dtype=None, devices=None) -> None:
    """Raises UserError when the weights and one cache of rows x length tokens exceed what the devices have free.

    dtype: of arrays, or the name of a form of the weights (weights/forms.py). cache_dtype: None for that of arrays.
    """
    specs, itemsize = decoder.declare(config)[1], jnp.dtype(cache_dtype or forms.array_dtype(dtype)).itemsize
    weights = forms.nbytes(specs, dtype)
    cache = rows * length * flops.kv_bytes_per_token(config, itemsize)
    free = free_bytes(devices)
    if free is not None and weights + cache > free:
        raise UserError(
            f"the model does not fit: {_gib(weights)} of weights and {_gib(cache)} of cache need {weights + cache} "
            f"bytes; {free} bytes ({_gib(free)}) are free here. Use {_smaller(specs, dtype, free - cache)}"
        )


def _smaller(specs: Tree, dtype: str, room: int) -> str:
    """What would make the weights fit."""
    fits = [repr(name) for name in ("bfloat16", *forms.FORMS) if name != dtype and forms.nbytes(specs, name) <= room]
    return f"dtype={' or '.join(fits)}, or more devices" if fits else "a smaller model, or more devices"


def check_cache(config: ModelConfig, rows: int, length: int, dtype, devices=None) -> None:
    """Raises UserError when a cache of rows x length tokens exceeds what the devices have free."""
    need = rows * length * flops.kv_bytes_per_token(config, jnp.dtype(dtype).itemsize)
    free = free_bytes(devices)
    if free is not None and need > free:
        raise UserError(
            f"a cache for {rows} rows of {length} tokens needs {need} bytes ({_gib(need)}); {free} bytes "
            f"({_gib(free)}) are free. Give fewer or shorter prompts, or a smaller max_new_tokens"
        )


def _host_free_bytes() -> int | None:
    """MemAvailable, or less where a control group limits this process. None off Linux."""
    free = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].strip().isdigit():
        free.append(max(0, int(limit[0]) - int(used[0])))
    return min(free, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
