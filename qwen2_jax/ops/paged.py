# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache, and writing it; on a mesh, each device's heads.

One step of the engine brings M tokens: one for each of B rows that decode, then chunks of R prompts, C tokens each.
They are one array for everything that works on tokens; attention takes the two kinds apart.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from qwen2_jax.kernels import decode_attention as _decode
from qwen2_jax.kernels import flash_attention as _flash
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.ops.implementations import implementation_of
from qwen2_jax.ops.per_device import before_weights, on_each_device, per_row, widened

# M tokens of a step  R layers of a cache, or prompts  C tokens of a chunk  N query heads  K kv heads  H head width
# P pages of a row  Y slots of a page

PAGES = ("layers", None, "kv_heads", None, None)
HEADS = (None, None, "heads", None)
NOWHERE = 2**30  # a page that no cache has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Where the M tokens of a step lie in a paged cache, int32: page and slot of each; the pages of each row's tokens.

    Slot s of page p of a row holds the token at position p * Y + s. Padding is in page NOWHERE, and not written.
    rows_BP: of the first B tokens, one for each row. prompts_RP: of the chunks of prompts behind them; None: no chunks.
    """

    page_M: jax.Array
    slot_M: jax.Array
    rows_BP: jax.Array
    prompts_RP: jax.Array | None

    @classmethod
    def of(cls, positions_M, rows_BP, prompts_RP, length: int) -> "PageLayout":
        """From positions, negative for padding, and pages of `length` slots."""

        def pages_of(positions, table):  # of the same number of rows
            return jnp.take_along_axis(table, jnp.maximum(positions, 0) // length, axis=1).reshape(-1)

        B = len(rows_BP)
        page_M = pages_of(positions_M[:B, None], rows_BP)
        if prompts_RP is not None:
            positions_RC = positions_M[B:].reshape(len(prompts_RP), -1)
            page_M = jnp.concatenate([page_M, pages_of(positions_RC, prompts_RP)])
        some_M = positions_M >= 0
        return cls(jnp.where(some_M, page_M, NOWHERE), jnp.where(some_M, positions_M % length, 0), rows_BP, prompts_RP)


def write_pages(
    caches: tuple[jax.Array, ...], repeat, new_M1KH: tuple[jax.Array, ...], pages: PageLayout
) -> tuple[jax.Array, ...]:
    """Each cache [R, pages, K, Y, H], and of int8 its scales [R, pages, K, Y], with new tokens of layer `repeat`."""
    new_M1KH = tuple(map(before_weights, new_M1KH))
    if caches[0].dtype == jnp.int8:
        new_M1KH = tuple(itertools.chain(*zip(*map(_decode.quantize_cache, new_M1KH), strict=True)))
    args = (caches, new_M1KH, pages.page_M, pages.slot_M, jnp.asarray(repeat, jnp.int32))

    def run(caches, new_M1KH, page_M, slot_M, repeat):
        def write(cache, new):
            return cache.at[repeat, page_M, :, slot_M].set(new[:, 0].astype(cache.dtype), mode="drop")

        return jax.tree.map(write, caches, new_M1KH)

    return on_each_device(run, args, (PAGES, (None, None, "kv_heads", None), (None,), (None,), ()), PAGES[:-1], None)


def paged_attention(
    queries: tuple[jax.Array, ...],
    caches: tuple[jax.Array, ...],
    repeat,
    *,
    pages: PageLayout,
    q_positions_M1: jax.Array,
    chunk_len=None,
    window=None,
    scale=None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of M tokens over layer `repeat` of a paged cache that they have been written to: [M, 1, N, H].

    queries: one rotation of [M, 1, N, H], or three (dual chunk). caches: keys, values, and of int8 their scales.
    chunk_len, window and scale are numbers or [M]; within a chunk of a prompt they are equal.
    """
    B, M = len(pages.rows_BP), len(q_positions_M1)
    queries = jax.tree.map(before_weights, queries)
    numbers = per_row((window, scale, None if len(queries) == 1 else chunk_len), M)
    repeat = jnp.asarray(repeat, jnp.int32)
    names = (HEADS, PAGES, (None, None), (None,), (None, None), ())

    def of_rows(queries, caches, positions_B1, numbers, table_BP, repeat):
        window, scale, chunk_len = numbers
        q, succ, inter = queries if len(queries) == 3 else (*queries, None, None)
        k, v, *scales = (x.reshape(-1, *x.shape[2:]) for x in caches)
        k_scale, v_scale = scales or (None, None)
        return _decode.decode_attention(
            q, succ, inter, k, v, q_positions_BT=positions_B1, block_table_BP=table_BP + repeat * caches[0].shape[1],
            chunk_len=chunk_len, window=window, scale=scale, k_scale=k_scale, v_scale=v_scale, implementation=decode,
        )  # fmt: skip

    def of_prompts(queries, caches, positions_RC, numbers, table_RP, repeat):
        window, scale, chunk_len = numbers
        k, v, *scales = (_gathered(x, repeat, table_RP) for x in caches)
        if scales:
            k, v = (widened(x, s, queries[0].dtype) for x, s in zip((k, v), scales, strict=True))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        slots_RS = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
        common = {"q_positions_BT": positions_RC, "kv_positions_BS": slots_RS, "implementation": attention}
        common |= {"window": window, "scale": scale}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k, v, **common)
        return dual_chunk_attention(*queries, k, v, chunk_len=chunk_len, **common)

    decode = implementation_of("decode", implementation)
    first = jax.tree.map(lambda x: x[:B], (queries, q_positions_M1, numbers))
    args = (first[0], caches, *first[1:], pages.rows_BP, repeat)
    out_B1NH = on_each_device(of_rows, args, names, HEADS, decode)
    if pages.prompts_RP is None:
        return before_weights(out_B1NH)
    attention = implementation_of("attention", implementation)
    R = len(pages.prompts_RP)
    blocks = jax.tree.map(lambda x: x[B:].reshape(R, -1, *x.shape[2:]), (queries, q_positions_M1))
    args = (blocks[0], caches, blocks[1], tuple(n if n is None else n[B :: (M - B) // R] for n in numbers),
            pages.prompts_RP, repeat)  # fmt: skip
    out_RCNH = on_each_device(of_prompts, args, names, HEADS, attention)
    return before_weights(jnp.concatenate([out_B1NH, out_RCNH.reshape(M - B, 1, *out_B1NH.shape[2:])]))


def _gathered(x, repeat, table_RP):
    """The pages of each prompt as one cache, [R, K, P * Y, H], of one layer of [layers, pages, K, Y, H]."""
    pages = x.reshape(-1, *x.shape[2:])[table_RP + repeat * x.shape[1]]
    K, Y = pages.shape[2:4]
    return pages.swapaxes(1, 2).reshape(len(table_RP), K, table_RP.shape[1] * Y, *pages.shape[4:])
