# SPDX-License-Identifier: Apache-2.0
"""Computes something on the CPU and saves it: python -m benchmarks.device.host FILE MODULE.FUNCTION [ARGUMENT ...]."""

import importlib
import sys

import jax
import numpy as np

from .worker import find_sources

if __name__ == "__main__":
    find_sources()
    jax.config.update("jax_disable_most_optimizations", True)  # every program runs once
    file, name, *arguments = sys.argv[1:]
    module, function = name.split(".")
    np.savez(file, **getattr(importlib.import_module(f".{module}", __package__), function)(*arguments))
