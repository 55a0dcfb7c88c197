# SPDX-License-Identifier: Apache-2.0
"""Weights with a low-rank correction beside them (LoRA)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding

from qwen2_jax.weights import plain, weight
from qwen2_jax.weights.params import ParamSpec
from qwen2_jax.weights.weight import StoredWeight, Weight, matmul, part_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(StoredWeight):
    """A weight with a low-rank correction: weight = base + scale * b a (LoRA, Hu et al. 2021, arXiv:2106.09685).

    a: float32 [rank, *in]; b: float32 [*out, rank]; the dimension of layers comes first in both. The sum is never made:
    a product with it is the base's product plus two thin ones, so a base that is not differentiated may have any form,
    and needs neither a gradient nor a copy.
    """

    form: ClassVar[str] = "adapted"

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: jax.Array, contract: int, dtype) -> jax.Array:
        thin = matmul(x, self.a.astype(x.dtype), contract=contract, dtype=jnp.float32) * self.scale
        correction = matmul(thin.astype(x.dtype), self.b.astype(x.dtype), dtype=dtype)
        return matmul(x, self.base, contract=contract, dtype=dtype) + correction

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        raise TypeError("an embedding takes no low-rank correction")

    def dequantize(self) -> jax.Array:
        """As `summed`, in the dtype of the base."""
        return self.summed().astype(weight.dequantize(self.base).dtype)

    def summed(self) -> jax.Array:
        """base + scale * b a in float32. Of one layer: w[layer].summed()."""
        base = weight.dequantize(self.base)
        b_Or, a_rI = self.b.reshape(-1, self.b.shape[-1]), self.a.reshape(self.a.shape[0], -1)
        change_OI = jnp.matmul(b_Or, a_rI, precision=lax.Precision.HIGHEST) * self.scale
        return base.astype(jnp.float32) + change_OI.reshape(self.shape)

    def shardings(self, where: Sharding) -> "Adapted":
        dims = list(range(len(self.shape)))
        outputs, inputs = dims[: self.b.ndim - 1], dims[self.b.ndim - 1 :]
        layers = dims[: self.a.ndim - 1 - len(inputs)]
        a: Any = part_sharding(where, [*layers, None, *inputs])
        b: Any = part_sharding(where, [*outputs, None])
        return Adapted(weight.shardings(self.base, where), a, b, self.scale)

    def along(self, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> "Adapted":
        base = weight.along(self.base, spec, axis, change)
        outputs = self.b.ndim - 1
        if axis < outputs:
            return dataclasses.replace(self, base=base, b=plain.along(self.b, axis, change))
        a = plain.along(self.a, axis - outputs + bool(spec.layers) + 1, change)
        return dataclasses.replace(self, base=base, a=a)

    def convert(self, to: Callable[[jax.Array, ParamSpec], Weight], spec: ParamSpec) -> "Adapted":
        return dataclasses.replace(self, base=weight.convert_one(self.base, spec, to))
