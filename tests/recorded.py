# SPDX-License-Identifier: Apache-2.0
"""Recorded arrays, read whole: an open .npz file that the garbage collector closes is a warning, in any test."""

from collections.abc import Mapping

import numpy as np


def recorded_arrays(path) -> Mapping[str, np.ndarray]:
    """The arrays of an .npz file by name."""
    with np.load(path) as file:
        return dict(file)
