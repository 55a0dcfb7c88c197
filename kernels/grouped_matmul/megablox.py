# SPDX-License-Identifier: Apache-2.0
"""What jax itself brings for grouped products, under its own names: "megablox" and "ragged_dot".

* "megablox", Pallas kernels for TPU (jax.experimental.pallas.ops.tpu.megablox): the same list of visits as tiles.py,
  walked with BlockSpecs alone. A step multiplies a [tile, k] piece of the rows by a [k, n] piece of the matrix and adds
  to an accumulator, so with k < D an expert's whole matrix is read once per visit instead of once per group. Larger k
  does not fit: the kernel does not ask for more fast memory than a kernel gets by default.
* "ragged_dot", lax.ragged_dot_general: on TPU the compiler has a kernel for it (the lengths of its lists fit tiles of
  128 rows on v5e and of 256 on v6e, as here). It takes matrices as [E, D, F] only and copies those that come as
  [E, F, D]: 1.2 GB for 64 of 3584 x 2560. On CPU and GPU it multiplies every row by every expert: E times the work, and
  M E numbers of memory. There it is for comparison only.

Why the default on TPU is "tpu" and not one of these, in counted work, at 131072 rows, 64 experts, 3584 x 2560,
bfloat16: megablox with tiles of 512 x 896 x 1280, about as large as fits, multiplies 1.25 M rows and moves 8.9 GB;
"tpu" on v6e 1.12 M rows and 2.8 GB. At 918 TFLOP/s and 1.64 TB/s that is 5.4 ms against 2.9 ms; on v5e, where both are
bound by their products, 15 ms against 13 ms. Both products of the SwiGLU are two kernels here, so x is read twice as
often and g and u are written and read again. Nothing of this was measured on hardware.

M rows, D width in, F width out, E experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from ..target import require
from .gradients import with_gradients

TILES = (512, 1408, 1408)  # rows, contraction, columns: at most


class Backend(NamedTuple):
    """Which of jax's implementations; static."""

    name: str
    tiles: tuple[int, int, int] | None = None
    interpret: Any = False


def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, tiles=TILES):
    """jax's megablox. Returns [M, F] in x's dtype."""
    return _matmul(_megablox(x_MD, w, tiles), transpose_w, x_MD, w, group_sizes_E.astype(jnp.int32))


def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, *, tiles=TILES):
    """jax's megablox, twice. Returns [M, F] in x's dtype."""
    return _swiglu(_megablox(x_MD, gate_EFD, tiles), x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))


def ragged_matmul(x_MD, w, group_sizes_E, *, transpose_w=False):
    """lax.ragged_dot_general. Returns [M, F] in x's dtype."""
    return _matmul(Backend("ragged_dot"), transpose_w, x_MD, w, group_sizes_E.astype(jnp.int32))


def ragged_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E):
    """lax.ragged_dot_general, twice. Returns [M, F] in x's dtype."""
    return _swiglu(Backend("ragged_dot"), x_MD, gate_EFD, up_EFD, group_sizes_E.astype(jnp.int32))


def _megablox(x_MD, w, tiles) -> Backend:
    on = require("tpu")
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32) or w.dtype != x_MD.dtype:
        raise NotImplementedError(f"needs bfloat16 or float32, one for x and w, got {x_MD.dtype} and {w.dtype}")
    if 0 in x_MD.shape or 0 in w.shape:
        raise NotImplementedError(f"needs at least one row, expert and column, got {x_MD.shape} and {w.shape}")
    rows, k, n = tiles
    if x_MD.dtype == jnp.float32:
        k, n = k // 2, n // 2
    return Backend("megablox", (min(rows, -(-x_MD.shape[0] // 16) * 16), k, n), on.interpret)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("transpose_w",))
def _product(backend, x_MD, w, group_sizes_E, *, transpose_w):
    M, dtype = x_MD.shape[0], x_MD.dtype
    if backend.name == "megablox":
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            y_MF = gmm(
                _fill(x_MD, backend.tiles[0]),
                w,
                group_sizes_E,
                preferred_element_type=dtype,
                tiling=_tiling(backend, x_MD.shape[1], w.shape[1 if transpose_w else 2]),
                transpose_rhs=transpose_w,
                interpret=backend.interpret,
            )[:M]
    else:
        numbers = lax.RaggedDotDimensionNumbers((((1,), (2 if transpose_w else 1,)), ((), ())), [0], [0])
        y_MF = lax.ragged_dot_general(
            x_MD, w, group_sizes_E, numbers, precision=_precision(dtype), preferred_element_type=dtype
        )
    # Neither says what it leaves in the rows after the last group.
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes_E))[:, None], y_MF, 0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _weight_gradient(backend, left_MA, right_MC, group_sizes_E, dtype):
    if backend.name == "megablox":
        left, right = (_fill(x, backend.tiles[0]) for x in (left_MA, right_MC))
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return tgmm(
                left.T,
                right,
                group_sizes_E,
                preferred_element_type=dtype,
                tiling=_tiling(backend, left.shape[1], right.shape[1]),
                interpret=backend.interpret,
            )
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(
        left_MA, right_MC, group_sizes_E, numbers, precision=_precision(dtype), preferred_element_type=dtype
    )


def _fill(x, tile):
    """x with zero rows up to a multiple of `tile`, which megablox insists on."""
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _tiling(backend, contraction, columns):
    """Rows, and the widest tiles that divide the width: a remainder would be multiplied as if it were a whole tile."""
    rows, *limits = backend.tiles
    return rows, *(
        next((w for w in range(limit // 128 * 128, 0, -128) if width % w == 0), min(limit, width))
        for width, limit in zip((contraction, columns), limits, strict=True)
    )


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _products(backend, xs, ws, group_sizes_E, *, transpose_w, finish, results):
    """As with_gradients wants it, a kernel for each product."""
    made = [
        _product(backend, xs[p % len(xs)], w, group_sizes_E, transpose_w=transpose_w).astype(jnp.float32)
        for p, w in enumerate(ws)
    ]
    return tuple(y.astype(xs[0].dtype) for y in (finish(*made) if len(xs) == 1 else finish(sum(made))))


_matmul, _swiglu = with_gradients(_products, _weight_gradient)
