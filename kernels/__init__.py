# SPDX-License-Identifier: Apache-2.0
"""Attention and mixture-of-experts kernels: arrays in, arrays out. Imported as `qwen2_jax.kernels`."""

__version__ = "0"  # not the PyPI package of this name: version checks for that one must come out negative
