# SPDX-License-Identifier: Apache-2.0
"""Pieces that go wrong on purpose, with `--faults`: the command must name each and go on."""

import functools
import os
import resource
import time

import jax
import jax.numpy as jnp

from .checks import grouped
from .pieces import Setting


def right():
    return {"sum": float(jnp.arange(4).sum())}


def wrong(setting: Setting):
    """An implementation of grouped_matmul that doubles its input: the check must see it and name it."""
    from qwen2_jax.kernels import grouped_matmul

    def doubled(x, w, sizes, transpose_w):
        return grouped_matmul.xla.grouped_matmul(2 * x, w, sizes, transpose_w=transpose_w)

    grouped_matmul.IMPLEMENTATIONS["doubled"] = doubled
    return {
        "grouped_matmul doubled": functools.partial(grouped, "doubled", setting, (64, 3, 128, 128), (40, 0, 20), True)
    }


def hangs(setting: Setting):
    return {"never ends": lambda: time.sleep(10**6), "right": right}


def out_of_memory(setting: Setting):
    def too_much():
        stats = jax.devices()[0].memory_stats() or {}
        if setting.platform == "cpu":  # or the machine would give memory that it does not have until it is written
            resource.setrlimit(resource.RLIMIT_AS, (2**36, resource.RLIM_INFINITY))
        return {"sum": float(jnp.zeros(int(stats.get("bytes_limit", 2**40)) // 2, jnp.float32).sum())}

    return {"too much": too_much, "right": right}


def crashes(setting: Setting):
    return {"ends the process": lambda: os._exit(7), "right": right}
