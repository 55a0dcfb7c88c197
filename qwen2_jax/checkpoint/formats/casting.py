# SPDX-License-Identifier: Apache-2.0
"""Casts between float32, float16 and bfloat16 on the host, in blocks: numpy's bfloat16 casts are much slower."""

import ml_dtypes
import numpy as np

from qwen2_jax.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 1 << 16  # elements; the temporaries stay in the processor's cache


def cast_into(out: np.ndarray, x: np.ndarray) -> None:
    """out[...] = x, rounded to nearest even; shapes are equal. Same bits as `x.astype(out.dtype)`; NaNs stay NaNs."""
    if out.dtype == x.dtype:
        raw = np.dtype(f"u{out.dtype.itemsize}")  # as integers: numpy holds the interpreter lock to copy bfloat16
        np.copyto(out.view(raw), x.view(raw))
    elif BFLOAT16 not in (out.dtype, x.dtype):
        np.copyto(out, x, casting="unsafe")
    elif out.ndim == 0 or out.size <= BLOCK:
        _cast_block(out, x)
    else:
        rows = max(1, BLOCK * len(out) // out.size)
        for i in range(0, len(out), rows):
            if rows > 1 or out.ndim == 1:
                _cast_block(out[i : i + rows], x[i : i + rows])
            else:
                cast_into(out[i], x[i])


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in `dtype`: itself where it has it, else a cast copy."""
    if array.dtype == dtype:
        return array
    out = np.empty(array.shape, dtype)
    cast_into(out, array)
    return out


def narrowed(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As as_dtype. Raises CheckpointError that names the tensor where a finite number becomes an infinity."""
    with np.errstate(over="ignore"):
        out = as_dtype(array, dtype)
    if out is not array and not _finite(out) and _overflows(array.reshape(-1), out.reshape(-1)):
        largest = float(ml_dtypes.finfo(dtype).max)
        raise CheckpointError(
            f"{name} has numbers beyond {largest:g}, the largest of {dtype.name}; give bfloat16 or float32"
        )
    return out


def _finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    return all(np.isfinite(flat[at : at + BLOCK]).all() for at in range(0, flat.size, BLOCK))


def _overflows(before: np.ndarray, after: np.ndarray) -> bool:
    blocks = (slice(at, at + BLOCK) for at in range(0, before.size, BLOCK))
    return any((np.isinf(after[block]) & np.isfinite(before[block])).any() for block in blocks)


def _cast_block(out: np.ndarray, x: np.ndarray) -> None:
    if x.dtype == BFLOAT16:
        wide = x.view(np.uint16).astype(np.uint32)
        wide <<= 16
        with np.errstate(over="ignore"):
            np.copyto(out, wide.view(np.float32), casting="unsafe")
        return
    bits = x.astype(np.float32).view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if nan.any():
        rounded[nan] = (bits[nan] >> 16 & 0x8000) | 0x7FC0
    np.copyto(out.view(np.uint16), rounded, casting="unsafe")
