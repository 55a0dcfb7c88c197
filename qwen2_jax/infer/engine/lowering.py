# SPDX-License-Identifier: Apache-2.0
"""The Generator's programs, lowered without arrays: what a plan compiles for a machine that is not here."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen2_jax.infer.engine.programs import EOS_WIDTH, Generator, Orders, State
from qwen2_jax.model import rope
from qwen2_jax.model.kv_cache import Cache


def lower_prefill(
    generator: Generator, chunk: int, rows: int, length: int, long_context: rope.LongContext
) -> tuple[jax.stages.Lowered, Mapping[str, Any]]:
    """A prefill chunk of rows x chunk tokens into caches of `length` slots; the generator's params may be shapes.

    Returns what was lowered and its arguments by kind, as trees of jax.ShapeDtypeStruct.
    """
    cache, turns = _cache(generator, rows, length), _turns(generator, rows, length, long_context)
    tokens_BC = _shape(generator, (rows, chunk), jnp.int32)
    context_B = _shape(generator, (rows,), jnp.int32)
    prefill = generator.for_cache(rows, length).prefill
    lowered = prefill.lower(generator.params, cache, tokens_BC, tokens_BC, context_B, turns)
    return lowered, {"parameters": generator.params, "cache": cache, "tokens": (tokens_BC, tokens_BC, context_B, turns)}


def lower_decode(
    generator: Generator, rows: int, length: int, long_context: rope.LongContext
) -> tuple[jax.stages.Lowered, Mapping[str, Any]]:
    """The decoding loop for greedy rows with caches of `length` slots. Otherwise as lower_prefill."""
    cache, turns = _cache(generator, rows, length), _turns(generator, rows, length, long_context)
    ints_B: Any = _shape(generator, (rows,), jnp.int32)
    flags_B: Any = _shape(generator, (rows,), jnp.bool)
    eos_BE: Any = _shape(generator, (rows, EOS_WIDTH), jnp.int32)
    state, orders = State(cache, ints_B, ints_B, ints_B, flags_B, None), Orders(turns, None, eos_BE, ints_B)
    steps = _shape(generator, (), jnp.int32)
    lowered = generator.for_cache(rows, length).decode.lower(generator.params, state, orders, flags_B, steps)
    rest = (ints_B, ints_B, ints_B, flags_B, orders, flags_B, steps)
    return lowered, {"parameters": generator.params, "cache": cache, "tokens": rest}


def _cache(generator: Generator, rows: int, length: int) -> Cache:
    zeros = jax.eval_shape(
        lambda: Cache.zeros(generator.config, rows, length, generator.dtype, unroll=generator.unroll)
    )
    place = generator.places.cache(generator.config, rows, length)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), zeros)


def _turns(generator: Generator, rows: int, length: int, long_context: rope.LongContext) -> rope.Rope:
    """Shapes of the rotary numbers of rows that fill their caches."""
    turns = generator._rope([length] * rows, rows, length, long_context)
    return jax.tree.map(lambda x: _shape(generator, jnp.shape(x), jnp.result_type(x)), turns)


def _shape(generator: Generator, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=generator.places.everywhere)
