# SPDX-License-Identifier: Apache-2.0
"""Products with weight matrices, stored as they are, as int8, or with a low-rank correction beside them.

The only place that knows how weights are stored.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwen2_jax.ops import embedding
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.params import ParamSpec, Tree

# M rows, in one dimension or several  K summed features  F produced features  r rank
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight with a low-rank correction: weight = base + scale * b a (LoRA, Hu et al. 2021, arXiv:2106.09685).

    a: float32 [r, *in]; b: float32 [*out, r]. The sum is never made: a product with it is the base's product plus two
    thin ones, so a base that is not differentiated may be int8, and needs neither a gradient nor a copy.
    """

    base: jax.Array | Int8
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index) -> "Adapted":
        return jax.tree.map(lambda x: x[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


Weight = jax.Array | Int8 | Adapted


def put(w: Weight, where: Sharding) -> Weight:
    """The weight where an array of its shape is to lie; what lies there already is not copied.

    Scales and the parts of a correction are divided along their dimensions as the weight is along the same ones.
    """
    dims = list(range(len(w.shape)))
    if isinstance(w, Adapted):  # a [r, *in], b [*out, r], both behind a dimension of layers where they are stacked
        inputs = dims[w.b.ndim - 1 :]
        layers = dims[: w.a.ndim - 1 - len(inputs)]
        a, b = _along(where, [*layers, None, *inputs]), _along(where, [*dims[: w.b.ndim - 1], None])
        base = cast(jax.Array | Int8, put(w.base, where))
        return Adapted(base, jax.device_put(w.a, a), jax.device_put(w.b, b), w.scale)
    if isinstance(w, Int8):
        return Int8(jax.device_put(w.values, where), jax.device_put(w.scale, _along(where, dims[: w.scale.ndim])))
    return jax.device_put(w, where)


def _along(where: Sharding, dims: Sequence[int | None]) -> Sharding:
    """For an array with these dimensions of the one that lies at `where`; None: one of its own, which is whole."""
    if not isinstance(where, NamedSharding):
        return where
    groups = [*where.spec, *[None] * len(dims)]
    return NamedSharding(where.mesh, PartitionSpec(*(None if dim is None else groups[dim] for dim in dims)))


def linear(x: jax.Array, w: Weight, *, contract: int = 1, dtype=None) -> jax.Array:
    """x [..., *in] times w [*out, *in], summed over the `contract` last dimensions of both: [..., *out].

    Accumulates in float32 and returns `dtype`, by default x's.
    """
    dtype = dtype or x.dtype
    if isinstance(w, Adapted):
        thin = linear(x, w.a.astype(x.dtype), contract=contract, dtype=jnp.float32) * w.scale
        correction = linear(thin.astype(x.dtype), w.b.astype(x.dtype), dtype=dtype)
        return linear(x, w.base, contract=contract, dtype=dtype) + correction
    rows, features = x.shape[: x.ndim - contract], w.shape[: len(w.shape) - contract]
    # On a mesh rows and their tokens may both be split, and one dimension of both together could not be: it would be
    # gathered.
    x_MK = x.reshape(*(rows if sharding.current_mesh() else (math.prod(rows),)), -1)
    if isinstance(w, Int8):
        y_MF = _int8_product(x_MK, w.values.reshape(-1, x_MK.shape[-1]), w.scale.reshape(-1), dtype)
    elif x.dtype.itemsize < 4:
        y_MF = _half_product(x_MK, w.reshape(-1, x_MK.shape[-1]), dtype)
    else:
        y_MF = _product(x_MK, w.reshape(-1, x_MK.shape[-1]), dtype)
    return y_MF.reshape(*rows, *features)


def embed(table_VD: Weight, ids: jax.Array, dtype) -> jax.Array:
    """Rows of the embedding, [..., D] in `dtype`. On a mesh no device sees more of the table than it has."""
    if isinstance(table_VD, Adapted):
        raise TypeError("an embedding takes no low-rank correction")
    if isinstance(table_VD, Int8):
        look_up = lambda table_VD, ids: (table_VD.values[ids] * table_VD.scale[ids][..., None]).astype(dtype)  # noqa: E731
        return embedding.look_up(look_up, table_VD, ids)
    return _rows(table_VD.shape, table_VD, ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(shape: tuple[int, int], table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """table_VD[ids], with a gradient that adds up in float32."""
    return embedding.look_up(lambda table_VD, ids: table_VD[ids], table_VD, ids)


def _rows_forward(shape: tuple[int, int], table_VD: jax.Array, ids: jax.Array):
    return _rows(shape, table_VD, ids), (ids, table_VD[:0])


def _rows_backward(shape: tuple[int, int], residuals, gradient: jax.Array):
    """A frequent token's row is the sum of thousands of terms: in bfloat16 it would stop growing at a few hundred."""
    ids, like = residuals
    sums_VD = embedding.add_up(shape, ids, gradient)
    return sums_VD.astype(like.dtype), np.zeros(ids.shape, jax.dtypes.float0)


_rows.defvjp(_rows_forward, _rows_backward)


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
        if not is_matrix(spec):
            quantized[name] = leaf
        elif isinstance(leaf, Adapted):
            quantized[name] = dataclasses.replace(leaf, base=_to_int8(leaf.base, inputs=summed(spec)))
        else:
            quantized[name] = _to_int8(leaf, inputs=summed(spec))
    return quantized


def is_quantized(params: Tree) -> bool:
    """Whether some weight is Int8."""
    return any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8)))


def is_matrix(spec: ParamSpec) -> bool:
    """Whether `linear` or `embed` serve this parameter, so that it may be stored in any form: no routed expert is."""
    dims = [axis for axis in spec.axes if axis != "layers"]
    return spec.decay and len(dims) >= 2 and "experts" not in dims


def summed(spec: ParamSpec) -> int:
    """How many of a matrix's last dimensions `linear` sums over."""
    return 2 if spec.axes[-2:] == ("heads", "head_dim") else 1


def along(w: Weight, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> Weight:
    """The weight with `change` applied along one of its dimensions, which `change` gets as an array's first.

    change: picks, repeats or fills up with zeros along that dimension, and leaves the others.
    """

    def moved(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(change(jnp.moveaxis(x, axis, 0)), 0, axis)

    outputs = len(spec.shape) - summed(spec)
    if isinstance(w, Adapted):
        base: Any = along(w.base, spec, axis, change)
        if axis < outputs:
            return dataclasses.replace(w, base=base, b=moved(w.b, axis))
        return dataclasses.replace(w, base=base, a=moved(w.a, axis - outputs + bool(spec.layers) + 1))
    if isinstance(w, Int8):
        return Int8(moved(w.values, axis), moved(w.scale, axis) if axis < outputs else w.scale)
    return moved(w, axis)


def merged(w: Adapted) -> jax.Array:
    """base + scale * b a of one layer, summed in float32, in the base's dtype. A base in int8 would round it away."""
    if isinstance(w.base, Int8):
        raise TypeError("an int8 weight takes no correction")
    b_Fr, a_rK = w.b.reshape(-1, w.b.shape[-1]), w.a.reshape(w.a.shape[0], -1)
    change_FK = jnp.matmul(b_Fr, a_rK, precision=lax.Precision.HIGHEST) * w.scale
    return (w.base.astype(jnp.float32) + change_FK.reshape(w.shape)).astype(w.base.dtype)


@partial(jax.jit, static_argnames="inputs")
def _to_int8(w: jax.Array, inputs: int) -> Int8:
    """inputs: how many of the last dimensions are summed over."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=tuple(range(-inputs, 0)), keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8(values, scale.reshape(w.shape[: w.ndim - inputs]))


def _product(x_MK: jax.Array, w_FK: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(x_MK, w_FK, (((x_MK.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _half_product(x_MK: jax.Array, w_FK: jax.Array, dtype) -> jax.Array:
    """_product for bfloat16 with the two detours that XLA:CPU needs; elsewhere it is _product."""

    def on_cpu(x_MK, w_FK):
        M = math.prod(x_MK.shape[:-1])
        if M == 1:  # one row alone converts the whole weight first and takes 10 times as long as two
            return _product(jnp.concatenate([x_MK, jnp.zeros_like(x_MK)]), w_FK, dtype)[:1]
        if M >= MANY_ROWS:
            return _product(x_MK.astype(jnp.float32), w_FK.astype(jnp.float32), jnp.float32).astype(dtype)
        return _product(x_MK, w_FK, dtype)

    return lax.platform_dependent(x_MK, w_FK, cpu=on_cpu, default=lambda x, w: _product(x, w, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _int8_product(x_MK: jax.Array, w_FK: jax.Array, scale_F: jax.Array, dtype) -> jax.Array:
    """The product with an Int8 weight. Only the weight is rounded to 8 bits; x keeps at least 15.

    The weight is a constant: differentiated is x alone, and as if it were not rounded (rounding has no slope).
    """

    def converted(x_MK, w_FK, scale_F):
        return (_product(x_MK, w_FK.astype(x_MK.dtype), jnp.float32) * scale_F).astype(dtype)

    def on_cpu(x_MK, w_FK, scale_F):
        # The fast products on CPU are int8 by int8, and want two rows at least. x = unit * (128 high + low) with high
        # and low in int8 gives both: two rows that together carry 15 bits of x, exact integer sums.
        if math.prod(x_MK.shape[:-1]) >= MANY_ROWS:
            return converted(x_MK.astype(jnp.float32), w_FK, scale_F)
        x_MK = x_MK.astype(jnp.float32)
        unit_M1 = jnp.max(jnp.abs(x_MK), axis=-1, keepdims=True) / (127 * 128)
        steps_MK = jnp.round(x_MK / jnp.where(unit_M1 > 0, unit_M1, 1))
        high_MK = jnp.round(steps_MK / 128)
        halves = jnp.concatenate([high_MK, steps_MK - 128 * high_MK]).astype(jnp.int8)
        high_MF, low_MF = jnp.split(_product(halves, w_FK, jnp.int32).astype(jnp.float32), 2)
        return ((128 * high_MF + low_MF) * unit_M1 * scale_F).astype(dtype)

    return lax.platform_dependent(x_MK, w_FK, scale_F, cpu=on_cpu, default=converted)


def _int8_forward(x_MK, w_FK, scale_F, dtype):
    return _int8_product(x_MK, w_FK, scale_F, dtype), (w_FK, scale_F, x_MK[:0])


def _int8_backward(dtype, residuals, dy_MF):
    w_FK, scale_F, like_x = residuals

    def product(dy_MF, w_FK, wide):
        dy_MF = (dy_MF.astype(jnp.float32) * scale_F).astype(wide)
        over_F = (((dy_MF.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(dy_MF, w_FK.astype(wide), over_F, preferred_element_type=like_x.dtype)

    dx_MK = lax.platform_dependent(
        dy_MF,
        w_FK,
        cpu=lambda dy_MF, w_FK: product(dy_MF, w_FK, jnp.float32).astype(like_x.dtype),
        default=lambda dy_MF, w_FK: product(dy_MF, w_FK, like_x.dtype),
    )
    return dx_MK, None, None


_int8_product.defvjp(_int8_forward, _int8_backward)
