# SPDX-License-Identifier: Apache-2.0
"""Products with weight matrices, stored as they are or as int8: the only place that knows how weights are stored."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.params import Tree

# M rows  K summed features  F produced features
MANY_ROWS = 256  # from here on XLA:CPU is faster with a product's inputs converted to float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A weight as int8 with one float32 scale per output: weight = values * scale.

    values: int8 [*out, *in]; scale: float32 [*out]. Half the bytes of bfloat16, and 1.5 times its decoding speed on
    a CPU (benchmarks/RESULTS.md). The rounding error is at most 1/254 of the largest weight of each output.
    """

    values: jax.Array
    scale: jax.Array

    def __getitem__(self, index) -> "Int8":
        return jax.tree.map(lambda x: x[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weight = jax.Array | Int8


def linear(x: jax.Array, w: Weight, *, contract: int = 1, dtype=None) -> jax.Array:
    """x [..., *in] times w [*out, *in], summed over the `contract` last dimensions of both: [..., *out].

    Accumulates in float32 and returns `dtype`, by default x's.
    """
    dtype = dtype or x.dtype
    rows, features = x.shape[: x.ndim - contract], w.shape[: len(w.shape) - contract]
    x_MK = x.reshape(math.prod(rows), -1)
    if isinstance(w, Int8):
        y_MF = _int8_product(x_MK, w.values.reshape(-1, x_MK.shape[-1]), w.scale.reshape(-1), dtype)
    elif x.dtype.itemsize < 4:
        y_MF = _half_product(x_MK, w.reshape(-1, x_MK.shape[-1]), dtype)
    else:
        y_MF = _product(x_MK, w.reshape(-1, x_MK.shape[-1]), dtype)
    return y_MF.reshape(*rows, *features)


def embed(table_VD: Weight, ids: jax.Array, dtype) -> jax.Array:
    """Rows of the embedding, [..., D] in `dtype`."""
    if isinstance(table_VD, Int8):
        return (table_VD.values[ids] * table_VD.scale[ids][..., None]).astype(dtype)
    return table_VD[ids]


def quantize(params: Tree, specs: Tree) -> Tree:
    """The same parameters with every weight matrix that `linear` and `embed` serve as Int8.

    Norms, biases, routers and routed experts stay. Empties `params` array by array, so that the two never need the
    memory of both.
    """
    quantized: Tree = {}
    for name in list(params):
        leaf, spec = params.pop(name), specs[name]
        if isinstance(leaf, dict):
            quantized[name] = quantize(leaf, spec)
            continue
        matrix = len([axis for axis in spec.axes if axis != "layers"]) >= 2
        if spec.decay and matrix and "experts" not in spec.axes:
            quantized[name] = _to_int8(leaf, inputs=2 if spec.axes[-2:] == ("heads", "head_dim") else 1)
        else:
            quantized[name] = leaf
    return quantized


def is_quantized(params: Tree) -> bool:
    """Whether some weight is Int8."""
    return any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8)))


@partial(jax.jit, static_argnames="inputs")
def _to_int8(w: jax.Array, inputs: int) -> Int8:
    """inputs: how many of the last dimensions are summed over."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=tuple(range(-inputs, 0)), keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8(values, scale.reshape(w.shape[: w.ndim - inputs]))


def _product(x_MK: jax.Array, w_FK: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(x_MK, w_FK, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _half_product(x_MK: jax.Array, w_FK: jax.Array, dtype) -> jax.Array:
    """_product for bfloat16 with the two detours that XLA:CPU needs; elsewhere it is _product."""

    def on_cpu(x_MK, w_FK):
        if x_MK.shape[0] == 1:  # one row alone converts the whole weight first and takes 10 times as long as two
            return _product(jnp.concatenate([x_MK, jnp.zeros_like(x_MK)]), w_FK, dtype)[:1]
        if x_MK.shape[0] >= MANY_ROWS:
            return _product(x_MK.astype(jnp.float32), w_FK.astype(jnp.float32), jnp.float32).astype(dtype)
        return _product(x_MK, w_FK, dtype)

    return lax.platform_dependent(x_MK, w_FK, cpu=on_cpu, default=lambda x, w: _product(x, w, dtype))


def _int8_product(x_MK: jax.Array, w_FK: jax.Array, scale_F: jax.Array, dtype) -> jax.Array:
    """The product with an Int8 weight. Only the weight is rounded to 8 bits; x keeps at least 15."""

    def converted(x_MK, w_FK, scale_F):
        return (_product(x_MK, w_FK.astype(x_MK.dtype), jnp.float32) * scale_F).astype(dtype)

    def on_cpu(x_MK, w_FK, scale_F):
        # The fast products on CPU are int8 by int8, and want two rows at least. x = unit * (128 high + low) with high
        # and low in int8 gives both: two rows that together carry 15 bits of x, exact integer sums.
        M = x_MK.shape[0]
        if M >= MANY_ROWS:
            return converted(x_MK.astype(jnp.float32), w_FK, scale_F)
        x_MK = x_MK.astype(jnp.float32)
        unit_M1 = jnp.max(jnp.abs(x_MK), axis=-1, keepdims=True) / (127 * 128)
        steps_MK = jnp.round(x_MK / jnp.where(unit_M1 > 0, unit_M1, 1))
        high_MK = jnp.round(steps_MK / 128)
        halves = jnp.concatenate([high_MK, steps_MK - 128 * high_MK]).astype(jnp.int8)
        sums = _product(halves, w_FK, jnp.int32).astype(jnp.float32)
        return ((128 * sums[:M] + sums[M:]) * unit_M1 * scale_F).astype(dtype)

    return lax.platform_dependent(x_MK, w_FK, scale_F, cpu=on_cpu, default=converted)
