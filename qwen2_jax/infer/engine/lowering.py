# SPDX-License-Identifier: Apache-2.0
"""The Generator's programs, lowered for shapes instead of arrays: a plan compiles them for a target machine."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen2_jax.infer.engine.decode_batch import DecodeState
from qwen2_jax.infer.engine.programs import Generator
from qwen2_jax.infer.engine.sampling import RowParams
from qwen2_jax.infer.engine.sampling_params import MAX_EOS_IDS
from qwen2_jax.model import rope
from qwen2_jax.model.kv_cache import Cache


def lower_prefill(
    generator: Generator, chunk: int, rows: int, length: int, long_context: rope.LongContext
) -> tuple[jax.stages.Lowered, Mapping[str, Any]]:
    """A prefill chunk of rows x chunk tokens into caches of `length` slots; the generator's params may be shapes.

    Returns the lowered program and its arguments by kind, as trees of jax.ShapeDtypeStruct.
    """
    cache, rotary = _cache(generator, rows, length), _rotary_tables(generator, rows, length, long_context)
    tokens_BT = _shape(generator, (rows, chunk), jnp.int32)
    context_B = _shape(generator, (rows,), jnp.int32)
    prefill = generator.for_cache(rows, length).prefill
    lowered = prefill.lower(generator.params, cache, tokens_BT, tokens_BT, context_B, rotary)
    return lowered, {
        "parameters": generator.params,
        "cache": cache,
        "tokens": (tokens_BT, tokens_BT, context_B, rotary),
    }


def lower_decode(
    generator: Generator, rows: int, length: int, long_context: rope.LongContext
) -> tuple[jax.stages.Lowered, Mapping[str, Any]]:
    """The decoding loop for greedy rows with caches of `length` slots. Otherwise as lower_prefill."""
    cache, rotary = _cache(generator, rows, length), _rotary_tables(generator, rows, length, long_context)
    ints_B: Any = _shape(generator, (rows,), jnp.int32)
    flags_B: Any = _shape(generator, (rows,), jnp.bool)
    eos_ids: Any = _shape(generator, (rows, MAX_EOS_IDS), jnp.int32)
    state = DecodeState(cache, ints_B, ints_B, ints_B, flags_B, None)
    row_params = RowParams(limit_B=ints_B, eos_ids=eos_ids, sampling=None)
    steps = _shape(generator, (), jnp.int32)
    rest = (row_params, rotary, flags_B, steps)
    lowered = generator.for_cache(rows, length).decode.lower(generator.params, state, *rest)
    tokens = (ints_B, ints_B, ints_B, flags_B, *rest)
    return lowered, {"parameters": generator.params, "cache": cache, "tokens": tokens}


def _cache(generator: Generator, rows: int, length: int) -> Cache:
    return generator.cache_shapes(rows, length)


def _rotary_tables(generator: Generator, rows: int, length: int, long_context: rope.LongContext) -> rope.Rope:
    """Shapes of the rotary tables of rows that fill their caches."""
    tables = generator.rotary_tables([length] * rows, rows, length, long_context)
    return jax.tree.map(lambda x: _shape(generator, jnp.shape(x), jnp.result_type(x)), tables)


def _shape(generator: Generator, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=generator.shardings.replicated)
