# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to int8, with one scale for each output."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding

from qwen2_jax.ops import embedding
from qwen2_jax.weights import plain
from qwen2_jax.weights.params import ParamSpec, Tree
from qwen2_jax.weights.weight import Experts, StoredWeight, convert, part_sharding, summed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(StoredWeight):
    """A weight as int8 with one float32 scale per output: weight = values * scale.

    values: int8 [*out, *in]; scale: float32 [*out]. Half the bytes of bfloat16, and 1.5 times its decoding speed on
    a CPU (benchmarks/RESULTS.md). The rounding error is at most 1/254 of the largest weight of each output.
    """

    form: ClassVar[str] = "int8"

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def matmul(self, x: jax.Array, contract: int, dtype) -> jax.Array:
        def run(x_MI):
            return _product(x_MI, self.values.reshape(-1, x_MI.shape[-1]), self.scale.reshape(-1), dtype)

        return plain.over_rows(run, x, contract, self.shape[: len(self.shape) - contract])

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        def rows(table: Int8, ids):
            return (table.values[ids] * table.scale[ids][..., None]).astype(dtype)

        return embedding.look_up(rows, self, ids)

    def dequantize(self) -> jax.Array:
        inputs = self.values.ndim - self.scale.ndim
        return self.values * self.scale.reshape(*self.scale.shape, *[1] * inputs)

    def shardings(self, where: Sharding) -> "Int8":
        scale: Any = part_sharding(where, range(self.scale.ndim))
        return Int8(where, scale)  # type: ignore[arg-type]

    def along(self, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> "Int8":
        of_output = axis < self.scale.ndim
        scale = plain.along(self.scale, axis, change) if of_output else self.scale
        return Int8(plain.along(self.values, axis, change), scale)

    def of_experts(self) -> Experts:
        return self.values, self.scale, None


def quantize(params: Tree, specs: Tree) -> Tree:
    """The parameters with every weight matrix as Int8; see weight.convert, which empties `params` as it goes."""
    return convert(params, specs, to_int8)


def to_int8(w: jax.Array, spec: ParamSpec) -> Int8:
    """The weight rounded to the nearest of 255 values per output."""
    return _rounded(w, summed(spec))


@partial(jax.jit, static_argnames="inputs")
def _rounded(w: jax.Array, inputs: int) -> Int8:
    """inputs: how many of the last dimensions are summed over."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=tuple(range(-inputs, 0)), keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8(values, scale.reshape(w.shape[: w.ndim - inputs]))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_MI: jax.Array, values_OI: jax.Array, scale_O: jax.Array, dtype) -> jax.Array:
    """x times the weight. Only the weight is rounded to 8 bits; x keeps at least 15.

    The weight is a constant. The gradient of x is that of the product without x's rounding, whose own slope is zero.
    """

    def converted(x_MI, values_OI, scale_O):
        return (plain.product(x_MI, values_OI.astype(x_MI.dtype), jnp.float32) * scale_O).astype(dtype)

    def on_cpu(x_MI, values_OI, scale_O):
        # The fast products on CPU are int8 by int8, and want two rows at least. x = unit * (128 high + low) with high
        # and low in int8 gives both: two rows that together carry 15 bits of x, exact integer sums.
        if math.prod(x_MI.shape[:-1]) >= plain.MANY_ROWS:
            return converted(x_MI.astype(jnp.float32), values_OI, scale_O)
        x_MI = x_MI.astype(jnp.float32)
        unit_M1 = jnp.max(jnp.abs(x_MI), axis=-1, keepdims=True) / (127 * 128)
        steps_MI = jnp.round(x_MI / jnp.where(unit_M1 > 0, unit_M1, 1))
        high_MI = jnp.round(steps_MI / 128)
        halves = jnp.concatenate([high_MI, steps_MI - 128 * high_MI]).astype(jnp.int8)
        high_MO, low_MO = jnp.split(plain.product(halves, values_OI, jnp.int32).astype(jnp.float32), 2)
        return ((128 * high_MO + low_MO) * unit_M1 * scale_O).astype(dtype)

    return lax.platform_dependent(x_MI, values_OI, scale_O, cpu=on_cpu, default=converted)


def _forward(x_MI, values_OI, scale_O, dtype):
    return _product(x_MI, values_OI, scale_O, dtype), (values_OI, scale_O, x_MI[:0])


def _backward(dtype, residuals, dy_MO):
    values_OI, scale_O, like_x = residuals

    def product(dy_MO, values_OI, wide):
        dy_MO = (dy_MO.astype(jnp.float32) * scale_O).astype(wide)
        over_O = (((dy_MO.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(dy_MO, values_OI.astype(wide), over_O, preferred_element_type=like_x.dtype)

    dx_MI = lax.platform_dependent(
        dy_MO,
        values_OI,
        cpu=lambda dy_MO, values_OI: product(dy_MO, values_OI, jnp.float32).astype(like_x.dtype),
        default=lambda dy_MO, values_OI: product(dy_MO, values_OI, like_x.dtype),
    )
    return dx_MI, None, None


_product.defvjp(_forward, _backward)
