# SPDX-License-Identifier: Apache-2.0
"""Weights as integers of 4 or 8 bits in groups of inputs, each group with a scale and perhaps an offset.

This one form holds what GGUF, GPTQ, AWQ and compressed-tensors files store, without rounding again.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, Sharding

from qwen2_jax import ops
from qwen2_jax.ops import embedding
from qwen2_jax.weights import plain
from qwen2_jax.weights.int8 import to_int8
from qwen2_jax.weights.params import ParamSpec
from qwen2_jax.weights.weight import Experts, StoredWeight, Weight, part_sharding, summed

# O outputs  I inputs  G groups  g inputs of a group

GROUPS = (64, 32, 16)  # sizes that `to_int4` tries; the first that divides the inputs of a weight
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # shares of a group's range that are tried
ROWS_AT_A_TIME = 2**24  # numbers that are rounded at a time, at most: each takes some float32 copies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups(StoredWeight):
    """weight = scale * values - offset, with a scale and an offset for each group of neighbouring inputs.

    values: int4 or int8 [*out, *in]; scale, offset: float32 [*out, G]; offset is None where it is zero. inputs: how
    many of the last dimensions of `values` are inputs; groups run over these dimensions as over one.
    """

    form: ClassVar[str] = "int4"

    values: jax.Array
    scale: jax.Array
    offset: jax.Array | None
    inputs: int = dataclasses.field(metadata={"static": True}, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return math.prod(self.shape[-self.inputs :]) // self.scale.shape[-1]

    def matmul(self, x: jax.Array, contract: int, dtype) -> jax.Array:
        scale, offset = (None if p is None else p.reshape(-1, p.shape[-1]) for p in (self.scale, self.offset))

        def run(x_MI):
            return ops.weight_only_matmul(x_MI, self.values.reshape(-1, x_MI.shape[-1]), scale, offset, dtype=dtype)

        return plain.over_rows(run, x, contract, self.shape[: len(self.shape) - contract])

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        def rows(table: Groups, ids):
            return table[ids].dequantize().astype(dtype)

        return embedding.look_up(rows, self, ids)

    def dequantize(self) -> jax.Array:
        in_groups = self.values.reshape(*self.scale.shape, self.group).astype(jnp.float32)
        w = in_groups * self.scale[..., None]
        return (w if self.offset is None else w - self.offset[..., None]).reshape(self.shape)

    def shardings(self, where: Sharding) -> "Groups":
        """Groups are divided with the first of the inputs, where that gives each device whole ones (see `divided`)."""
        outputs = self.scale.ndim - 1
        parts = _parts(where, outputs)
        of_group: Any = part_sharding(where, [*range(outputs), outputs if self.scale.shape[-1] % parts == 0 else None])
        return Groups(where, of_group, None if self.offset is None else of_group, self.inputs)  # type: ignore[arg-type]

    def along(self, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> "Groups":
        values, outputs = plain.along(self.values, axis, change), self.scale.ndim - 1
        if axis < outputs:
            scale, offset = (None if p is None else plain.along(p, axis, change) for p in (self.scale, self.offset))
        elif axis == outputs:
            fine, count = self.divided(self.shape[axis]), self.shape[axis]

            def of_input(part: jax.Array | None) -> jax.Array | None:
                """Scales of each entry along the axis, changed as the entries are."""
                if part is None:
                    return None
                each = part.reshape(*part.shape[:-1], count, -1)
                return plain.along(each, axis, change).reshape(*part.shape[:-1], -1)

            scale, offset = of_input(fine.scale), of_input(fine.offset)
        else:
            raise NotImplementedError(f"groups of inputs run over dimension {axis}")
        assert scale is not None
        return dataclasses.replace(self, values=values, scale=scale, offset=offset)

    def divided(self, parts: int) -> Self:
        """The same weight with scales repeated so that each n-th part of the inputs holds whole groups."""
        inputs = math.prod(self.shape[-self.inputs :])
        times = self.group // math.gcd(self.group, inputs // parts)
        if times == 1:
            return self
        repeat = partial(jnp.repeat, repeats=times, axis=-1)
        return dataclasses.replace(
            self, scale=repeat(self.scale), offset=None if self.offset is None else repeat(self.offset)
        )

    def fitted(self, where: Sharding) -> Self:
        return self.divided(_parts(where, self.scale.ndim - 1))

    def of_experts(self) -> Experts:
        return self.values, self.scale, self.offset


def _parts(where: Sharding, dim: int) -> int:
    """Into how many parts a dimension of the weight is divided."""
    if not isinstance(where, NamedSharding) or dim >= len(where.spec):
        return 1
    axes = where.spec[dim]
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(where.mesh.shape[name] for name in names)


def to_int4(w: jax.Array, spec: ParamSpec) -> Weight:
    """The weight rounded to 16 values for each group of 64 inputs (32 or 16 where 64 does not divide them).

    Embedding and LM head are rounded to int8 with a scale for each output: 4 bits cost most there.
    A weight whose inputs have no whole groups is left as it is.
    """
    if "vocab" in spec.axes:
        return to_int8(w, spec)
    inputs = summed(spec)
    I = math.prod(w.shape[w.ndim - inputs :])
    group = next((g for g in GROUPS if I % g == 0), None)
    return w if group is None else _rounded(w, inputs, group)


@partial(jax.jit, static_argnames=("inputs", "group"))
def _rounded(w: jax.Array, inputs: int, group: int) -> Groups:
    outputs = w.shape[: w.ndim - inputs]
    w_OGg = w.reshape(-1, math.prod(w.shape[w.ndim - inputs :]) // group, group)
    size = max(1, ROWS_AT_A_TIME // math.prod(w_OGg.shape[1:]))
    values, scale, offset = lax.map(_round_row, w_OGg, batch_size=min(size, len(w_OGg)))
    return Groups(values.reshape(w.shape), scale.reshape(*outputs, -1), offset.reshape(*outputs, -1), inputs)


def _round_row(w_Gg: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values, scale, offset) of one output. Of several shares of each group's range, the one with the least squared
    error, after a fit of scale and offset to the chosen values by least squares."""
    w_Gg = w_Gg.astype(jnp.float32)
    low, high = w_Gg.min(axis=-1, keepdims=True), w_Gg.max(axis=-1, keepdims=True)
    middle, mean = (low + high) / 2, w_Gg.mean(axis=-1, keepdims=True)

    def tried(clip):
        step = clip * (high - low) / 15
        q = jnp.clip(jnp.round((w_Gg - middle) / jnp.where(step > 0, step, 1) - 0.5), -8, 7)
        about = q - q.mean(axis=-1, keepdims=True)
        square = jnp.sum(about * about, axis=-1, keepdims=True)
        scale = jnp.sum(about * (w_Gg - mean), axis=-1, keepdims=True) / jnp.where(square > 0, square, 1)
        offset = scale * q.mean(axis=-1, keepdims=True) - mean
        error = jnp.sum(jnp.square(scale * q - offset - w_Gg), axis=-1, keepdims=True)
        return error, q.astype(jnp.int8), scale, offset

    best = tried(CLIPS[0])
    for clip in CLIPS[1:]:
        other = tried(clip)
        best = jax.tree.map(lambda a, b, better=other[0] < best[0]: jnp.where(better, b, a), best, other)
    _, q, scale, offset = best
    return q.astype(jnp.int4), scale[..., 0], offset[..., 0]
