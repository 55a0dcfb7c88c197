# SPDX-License-Identifier: Apache-2.0
"""Computes something of models.py on the CPU and saves it: python -m benchmarks.device.host FILE FUNCTION."""

import sys

import jax
import numpy as np

from .worker import find_sources

if __name__ == "__main__":
    find_sources()
    jax.config.update("jax_disable_most_optimizations", True)  # every program runs once
    from . import models

    file, function, *arguments = sys.argv[1:]
    np.savez(file, **getattr(models, function)(*arguments))
