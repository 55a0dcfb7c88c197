# SPDX-License-Identifier: Apache-2.0
"""Computes something of models.py on the CPU and saves it: python -m benchmarks.device.host FILE FUNCTION."""

import sys

import numpy as np

from .worker import find_sources

if __name__ == "__main__":
    find_sources()
    from . import models

    file, function, *arguments = sys.argv[1:]
    np.savez(file, **getattr(models, function)(*arguments))
