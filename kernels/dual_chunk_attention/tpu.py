# SPDX-License-Identifier: Apache-2.0
"""Attention on TPUs, forward and backward: three Pallas kernels that iterate over a list of pairs of blocks.

Ordinary attention and Dual Chunk Attention are the same kernels. What differs is the list (visits.py): an entry names a
block of queries, a block of keys, and which rotation of the query scores this pair. So Dual Chunk Attention is one pass
with one running softmax, and costs what causal attention costs.

1. Outside, in XLA: lay the arrays out heads first (tpu_layout.py) and write the list, as packed words.
2. The words are prefetched into scalar memory (SMEM). The grid is (kv heads, entries of the list), and its
   second bound is a number known only at run time. From the word of step n, index maps find the blocks of step n:
   Pallas fetches them while step n - 1 computes, and fetches nothing that is already there.
3. Entries of one row of the list follow each other. Forward (a row is a block of queries): start the running softmax at
   the row's first entry, update it at every entry, divide and write at the last. Backward, twice: by queries for dq, by
   keys for dk and dv, so that every result is summed in VMEM and written once, in a fixed order.
4. An entry in which every token sees every other ("whole") needs no mask: nearly all of them, in a long sequence.

A table of logits is [keys, queries]. A softmax then goes down columns: its maximum and sum are elementwise operations
between registers, and what belongs to a query (maximum, sum, lse, delta) is a row of numbers that fills registers. The
other way round these would be reductions across lanes, with columns that leave 127 of 128 lanes empty. Logits are kept
in units of log 2, because 2^x is what the hardware computes. A mask is two comparisons: the keys that a query sees with
one rotation are an interval of positions.

B batch, T query length, S key length, N query heads, K kv heads, G = N // K, H head width, A rotations of the query;
I query blocks of block_q tokens, J key blocks of block_k = Y tokens; X = G * block_q, the queries of all heads that
share keys: columns of one product, so that keys are read once for all of them. U integers per key: its position
and, if there are any, its segment.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blockwise import LOWEST
from ..counts import Count
from ..masks import Masks, cotangent, last_queries
from ..target import Target, block_sizes, require
from ..visibility import CHUNK_REGIONS
from ..visits import Visits, blocks, plan, unpack
from .blocks import BLOCKS, tpu_shape_class
from .tpu_layout import (
    Keys,
    Queries,
    heads_first,
    in_slabs,
    key_side,
    pad,
    per_row,
    per_token,
    query_side,
    tokens_first,
)

LANES = 128  # numbers in a row of a vector register
PIECE = 256  # queries whose softmax is computed at a time
LIST_BYTES = 768 * 2**10  # of the list in SMEM, which holds 1 MiB; a longer list is walked in several slabs
VMEM_BYTES = 32 * 2**20  # a kernel may take; a core has 64 MiB (v5p) or 128 (v5e, v6e), and XLA keeps arrays there too
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    block_q: int
    block_k: int


class Static(NamedTuple):
    """What is fixed when the kernels are compiled: block sizes of each pass, and how to run (target.py)."""

    forward: Sizes
    dq: Sizes
    dkv: Sizes
    interpret: Any


# ---------------------------------------------------------------------- reading the list


class Walk(NamedTuple):
    """Decodes a visit list whose rows are blocks of queries ("query") or of keys ("key")."""

    by: str
    I: int
    J: int

    def place(self, word):
        """(b, i, j, a) of an entry: row of the batch, block of queries, block of keys, rotation."""
        row, column, a, _ = unpack(word, self.J if self.by == "query" else self.I)
        if self.by == "query":
            return row // self.I, row % self.I, self.J - 1 - column, a  # `_visits` numbers key blocks from the end
        return row // self.J, column, row % self.J, a

    def step(self, words):
        """(b, a, whole, first of its row, last of its row) of the entry that this step of the grid is at."""
        n, count = pl.program_id(1), pl.num_programs(1)
        words = words[jnp.maximum(n - 1, 0)], words[n], words[jnp.minimum(n + 1, count - 1)]
        before, row, after = (unpack(word, self.J if self.by == "query" else self.I)[0] for word in words)
        b, _, _, a = self.place(words[1])
        return b, a, words[1] & 1, (n == 0) | (before != row), (n == count - 1) | (after != row)


def _visits(walk: Walk, sizes: Sizes, masks: Masks) -> Visits:
    q_blocks = blocks(masks.q.positions, masks.q.segments, sizes.block_q)
    kv_blocks = blocks(masks.kv.positions, masks.kv.segments, sizes.block_k)
    if walk.by == "query":
        # From the newest keys to the oldest: as regions are walked 0, 1, 2, a block of keys with a boundary of chunks
        # inside is the last of one region and the first of the next, and so is fetched once.
        kv_blocks = jax.tree.map(lambda x: x[:, ::-1], kv_blocks)
    return plan(q_blocks, kv_blocks, window_B=masks.window_B, chunk_len_B=masks.chunk_len_B, by=walk.by)


# ---------------------------------------------------------------------- the kernels


def _dot(x, y, contract):
    """Product with float32 sums over dimension contract[0] of x and contract[1] of y; float32 inputs keep all bits."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)


def _columns(x):
    """The queries of a block, or what has their shape, as the X columns of one product: [G, block_q, H] -> [X, H]."""
    return x[...].reshape(-1, x.shape[-1])


def _to_column(row_1Y):
    """[1, Y] -> [Y, 1]. Whole registers are transposed, so the row is first broadcast over their rows."""
    return jnp.broadcast_to(row_1Y, (LANES, row_1Y.shape[1])).T[:, :1]


def _to_row(column_Y1):
    """[Y, 1] -> [1, Y]."""
    return jnp.broadcast_to(column_Y1, (column_Y1.shape[0], LANES)).T[:1]


def _mask(q_at, kv_at):
    """[Y, block_q]: whether a query sees a key, and with this entry's rotation; the same for all heads of the group."""
    low, high, *q_segment = (q_at[r : r + 1] for r in range(q_at.shape[0]))  # rows
    position, *kv_segment = (_to_column(kv_at[r : r + 1]) for r in range(kv_at.shape[0]))  # columns
    seen = (low <= position) & (position <= high)
    return seen & (q_segment[0] == kv_segment[0]) if q_segment else seen


def _logits(k, queries, factor, seen):
    """[Y, queries] in units of log 2, -inf where the mask is false; the mask of one head serves several in a row."""
    s = _dot(k[...], queries, (1, 1)) * factor
    if seen is None:
        return s
    heads = jnp.split(s, s.shape[1] // seen.shape[1], axis=1)
    return jnp.concatenate([jnp.where(seen, one, -jnp.inf) for one in heads], axis=1)


def _forward_kernel(walk, words, scale, q, k, v, q_at, kv_at, out, lse, top, total, acc):
    b, _, whole, first, last = walk.step(words)
    G, block_q, _ = q.shape

    @pl.when(first)
    def start():
        top[...] = jnp.full(top.shape, LOWEST)
        total[...] = jnp.zeros(total.shape)
        acc[...] = jnp.zeros(acc.shape)

    def visit(masked):
        seen_Yq = _mask(q_at, kv_at) if masked else None
        size = math.gcd(block_q, PIECE)
        pieces = [(g, slice(at, at + size)) for g in range(G) for at in range(0, block_q, size)]

        def logits(g, queries):
            return _logits(k, q[g, queries], scale[b] * LOG2_E, None if seen_Yq is None else seen_Yq[:, queries])

        # The logits are always one piece ahead, so that the next product is computed beside this softmax.
        s_next = logits(*pieces[0])
        for n in range(len(pieces)):
            s_Yq, s_next = s_next, logits(*pieces[n + 1]) if n + 1 < len(pieces) else None
            x = slice(n * size, (n + 1) * size)
            top_1q = jnp.maximum(top[:, x], s_Yq.max(axis=0, keepdims=True))
            p_Yq = jnp.exp2(s_Yq - top_1q)
            shrink_1q = jnp.exp2(top[:, x] - top_1q)
            top[:, x] = top_1q
            total[:, x] = total[:, x] * shrink_1q + p_Yq.sum(axis=0, keepdims=True)
            acc[:, x] = acc[:, x] * shrink_1q + _dot(v[...], p_Yq.astype(v.dtype), (0, 0))  # [H, q]

    pl.when(whole == 1)(functools.partial(visit, masked=False))
    pl.when(whole == 0)(functools.partial(visit, masked=True))

    @pl.when(last)
    def finish():
        some_1X = total[...] > 0
        total_1X = jnp.where(some_1X, total[...], 1)
        out[...] = (acc[...] / total_1X).T.astype(out.dtype).reshape(out.shape)
        lse[...] = jnp.where(some_1X, (top[...] + jnp.log2(total_1X)) / LOG2_E, -jnp.inf)


# The backward pass computes the probabilities again: p = 2^(s - lse2), lse2 being the log-sum-exp in units of log 2.
# With dp = dout v^T, the gradient of a logit is ds = p * (dp - delta), and dq = ds k, dk = ds^T q, dv = p^T dout.


def _dq_kernel(walk, words, scale, q, k, v, dout, lse2, delta, q_at, kv_at, dq, acc):
    b, a, whole, first, last = walk.step(words)

    @pl.when(first)
    def start():
        acc[...] = jnp.zeros(acc.shape)

    def visit(masked):
        seen_Yq = _mask(q_at, kv_at) if masked else None
        p_YX = jnp.exp2(_logits(k, _columns(q), scale[b] * LOG2_E, seen_Yq) - lse2[...])
        dp_YX = _dot(v[...], _columns(dout), (1, 1))
        ds_YX = p_YX * (dp_YX - delta[...])
        acc[a] += _dot(k[...], ds_YX.astype(k.dtype), (0, 0))  # [H, X]

    pl.when(whole == 1)(functools.partial(visit, masked=False))
    pl.when(whole == 0)(functools.partial(visit, masked=True))

    @pl.when(last)
    def finish():  # all rotations, also those without a visit in this block: their gradient is zero
        for rotation in range(acc.shape[0]):
            dq[rotation] = (acc[rotation] * scale[b]).T.astype(dq.dtype).reshape(dq.shape[1:])


def _dkv_kernel(walk, words, scale, q, k, v, dout, lse2, delta, q_at, kv_at, dk, dv, dscale, dk_acc, dv_acc):
    b, _, whole, first, last = walk.step(words)

    @pl.when(first)
    def start():
        dk_acc[...] = jnp.zeros(dk_acc.shape)
        dv_acc[...] = jnp.zeros(dv_acc.shape)

    def visit(masked):
        seen_Yq = _mask(q_at, kv_at) if masked else None
        p_YX = jnp.exp2(_logits(k, _columns(q), scale[b] * LOG2_E, seen_Yq) - lse2[...])
        dv_acc[...] += _dot(p_YX.astype(dout.dtype), _columns(dout), (1, 0))
        dp_YX = _dot(v[...], _columns(dout), (1, 1))
        ds_YX = p_YX * (dp_YX - delta[...])
        dk_acc[...] += _dot(ds_YX.astype(q.dtype), _columns(q), (1, 0))

    pl.when(whole == 1)(functools.partial(visit, masked=False))
    pl.when(whole == 0)(functools.partial(visit, masked=True))

    @pl.when(last)
    def finish():
        dk[...] = (dk_acc[...] * scale[b]).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)
        # Logits are linear in k and in the scale alike: with dk before scaling, sum(dk * k) is the scale's gradient.
        dscale[...] = _to_row(jnp.sum(dk_acc[...] * k[...].astype(jnp.float32), axis=1, keepdims=True))


# ---------------------------------------------------------------------- block specs


class Shape(NamedTuple):
    """Of one call; I and J count whole blocks."""

    A: int
    B: int
    K: int
    G: int
    H: int
    U: int
    I: int
    J: int
    dtype: Any


class Program(NamedTuple):
    """A kernel and its blocks: what `_run` calls and `count` counts."""

    kernel: Callable[..., None]
    walk: Walk
    inputs: list[pl.BlockSpec]
    outputs: list[pl.BlockSpec]
    input_types: list[jax.ShapeDtypeStruct]
    output_types: list[jax.ShapeDtypeStruct]
    scratch: list[Any]
    products: int  # matrix products per entry, each of Y * X * H multiplications and additions


def _program(kernel, by, shape: Shape, sizes: Sizes, inputs, outputs, scratch, products) -> Program:
    """Inputs and outputs are names of this table: what the array is, and the block of it that an entry needs."""
    A, B, K, G, H, U, I, J, dtype = shape
    block_q, block_k = sizes
    X, T, S = G * block_q, I * block_q, J * block_k
    walk = Walk(by, I, J)
    arrays = {
        "q": ((A, B, K, G, T, H), (None, None, None, G, block_q, H), lambda k, b, i, j, a: (a, b, k, 0, i, 0)),
        "dq": ((A, B, K, G, T, H), (A, None, None, G, block_q, H), lambda k, b, i, j, a: (0, b, k, 0, i, 0)),
        "out": ((B, K, G, T, H), (None, None, G, block_q, H), lambda k, b, i, j, a: (b, k, 0, i, 0)),
        "kv": ((B, K, S, H), (None, None, block_k, H), lambda k, b, i, j, a: (b, k, j, 0)),
        "per query": ((B, K, I, 1, X), (None, None, None, 1, X), lambda k, b, i, j, a: (b, k, i, 0, 0)),
        "per key": ((B, K, J, 1, block_k), (None, None, None, 1, block_k), lambda k, b, i, j, a: (b, k, j, 0, 0)),
        "q_at": ((A, B, 1 + U, T), (None, None, 1 + U, block_q), lambda k, b, i, j, a: (a, b, 0, i)),
        "kv_at": ((B, U, S), (None, U, block_k), lambda k, b, i, j, a: (b, 0, j)),
    }
    dtypes = {"per query": jnp.float32, "per key": jnp.float32, "q_at": jnp.int32, "kv_at": jnp.int32}

    def spec(name):
        _, block, index = arrays[name]
        return pl.BlockSpec(block, lambda k, n, words, *_: index(k, *walk.place(words[n])))

    def type_of(name):
        return jax.ShapeDtypeStruct(arrays[name][0], dtypes.get(name, dtype))

    return Program(
        kernel,
        walk,
        inputs=[spec(name) for name in inputs],
        outputs=[spec(name) for name in outputs],
        input_types=[type_of(name) for name in inputs],
        output_types=[type_of(name) for name in outputs],
        scratch=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        products=products,
    )


def _forward_program(shape: Shape, sizes: Sizes) -> Program:
    X, inputs = shape.G * sizes.block_q, ["q", "kv", "kv", "q_at", "kv_at"]
    scratch = [(1, X), (1, X), (shape.H, X)]
    return _program(_forward_kernel, "query", shape, sizes, inputs, ["out", "per query"], scratch, products=2)


BACKWARD_INPUTS = ["q", "kv", "kv", "out", "per query", "per query", "q_at", "kv_at"]  # "out" is its cotangent


def _dq_program(shape: Shape, sizes: Sizes) -> Program:
    scratch = [(shape.A, shape.H, shape.G * sizes.block_q)]
    return _program(_dq_kernel, "query", shape, sizes, BACKWARD_INPUTS, ["dq"], scratch, products=3)


def _dkv_program(shape: Shape, sizes: Sizes) -> Program:
    scratch = [(sizes.block_k, shape.H), (sizes.block_k, shape.H)]
    return _program(_dkv_kernel, "key", shape, sizes, BACKWARD_INPUTS, ["kv", "kv", "per key"], scratch, products=4)


PROGRAMS = {"forward": _forward_program, "dq": _dq_program, "dkv": _dkv_program}


def _run(name, static: Static, queries: Queries, keys: Keys, rows, masks: Masks):
    """One pass. `rows` are more inputs of the backward passes: dout, lse2, delta."""
    sizes, (A, B, K, G, T, H), (_, U, S) = getattr(static, name), queries.q_ABKGTH.shape, keys.at_BUS.shape
    shape = Shape(A, B, K, G, H, U, T // sizes.block_q, S // sizes.block_k, queries.q_ABKGTH.dtype)
    program = PROGRAMS[name](shape, sizes)
    visits = _visits(program.walk, sizes, masks._replace(q=queries.tokens, kv=keys.tokens))
    call = pl.pallas_call(
        functools.partial(program.kernel, program.walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,  # the list, and the scale of each row of the batch
            grid=(K, visits.starts[-1]),
            in_specs=program.inputs,
            out_specs=program.outputs,
            scratch_shapes=program.scratch,
        ),
        out_shape=program.output_types,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),  # where a chip has two cores, each takes half of the heads
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=static.interpret,
        name=f"attention_{name}",
    )
    inputs = (queries.q_ABKGTH, keys.k_BKSH, keys.v_BKSH, *rows, queries.at_ABUT, keys.at_BUS)
    return call(visits.words_Z, masks.scale_B, *inputs)


def _slabs(name, sizes: Sizes, A, B, T, S) -> int:
    """Into how many slabs the rows of the list are cut, so that it fits into scalar memory however long it gets."""
    rows, columns = -(-T // sizes.block_q), -(-S // sizes.block_k)
    if name == "dkv":
        rows, columns = columns, rows
    rows_at_once = LIST_BYTES // 4 // (A * B * columns)
    if rows_at_once == 0:
        raise NotImplementedError(
            f"needs {LIST_BYTES // 4} words of scalar memory to hold one row of its list: {A} rotations * batch {B} * "
            f"{columns} blocks, for {T} queries and {S} keys in blocks of {tuple(sizes)}"
        )
    return -(-rows // rows_at_once)


# ---------------------------------------------------------------------- forward and backward


def _forward(static: Static, rotations, k, v, masks: Masks):
    (block_q, block_k), (B, T, _, _), (S, K) = static.forward, rotations[0].shape, k.shape[1:3]
    keys = key_side(k, v, masks.kv, block_k)

    def slab(cut):
        rotations, q_tokens = cut
        queries, here = query_side(rotations, masks._replace(q=q_tokens), K, block_q), rotations[0].shape[1]
        out, lse = _run("forward", static, queries, keys, (), masks)
        return tokens_first(out)[:, :here], per_token(lse, block_q)[:, :here]

    count = _slabs("forward", static.forward, len(rotations), B, T, S)
    return in_slabs(count, block_q, slab, (rotations, masks.q))


def _backward(static: Static, residuals, cotangents):
    rotations, k, v, masks, out, lse_BTN = residuals
    dout, dlse_BTN = cotangents
    (B, T, _, _), (S, K), A = rotations[0].shape, k.shape[1:3], len(rotations)

    # d logit = p * (dp - delta); a cotangent of lse adds p * dlse, so it is only another part of delta.
    empty_BTN = lse_BTN == -jnp.inf
    delta_BTN = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse_BTN
    row_stats = (dout, *(jnp.where(empty_BTN, 0, x) for x in (lse_BTN * LOG2_E, delta_BTN)))

    def in_blocks(row_stats, block_q):
        dout, *numbers = pad(row_stats, block_q)
        return heads_first(dout, K), *(per_row(x, K, block_q) for x in numbers)

    def dq_slab(cut):
        rotations, q_tokens, row_stats = cut
        queries, here = query_side(rotations, masks._replace(q=q_tokens), K, static.dq.block_q), rotations[0].shape[1]
        rows = in_blocks(row_stats, static.dq.block_q)
        (dq_ABKGTH,) = _run("dq", static, queries, dq_keys, rows, masks)
        return tuple(tokens_first(x)[:, :here] for x in dq_ABKGTH)

    dq_keys = key_side(k, v, masks.kv, static.dq.block_k)
    count = _slabs("dq", static.dq, A, B, T, S)
    dq = in_slabs(count, static.dq.block_q, dq_slab, (rotations, masks.q, row_stats))

    def dkv_slab(cut):
        k, v, kv_tokens = cut
        keys, here = key_side(k, v, kv_tokens, static.dkv.block_k), k.shape[1]
        dk, dv, dscale = _run("dkv", static, dkv_queries, keys, dkv_rows, masks)
        dscale_BSK = dscale.reshape(B, K, -1).swapaxes(1, 2)
        return tuple(x[:, :here] for x in (dk.swapaxes(1, 2), dv.swapaxes(1, 2), dscale_BSK))

    dkv_queries = query_side(rotations, masks, K, static.dkv.block_q)
    dkv_rows = in_blocks(row_stats, static.dkv.block_q)
    count = _slabs("dkv", static.dkv, A, B, T, S)
    dk, dv, dscale_BSK = in_slabs(count, static.dkv.block_k, dkv_slab, (k, v, masks.kv))
    return dq, dk, dv, cotangent(dscale_BSK.sum((1, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, rotations, k, v, masks):
    return _forward(static, rotations, k, v, masks)


def _attend_forward(static, *inputs):
    out, lse_BTN = _forward(static, *inputs)
    return (out, lse_BTN), (*inputs, out, lse_BTN)


_attend.defvjp(_attend_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


def _static(A, B, T, S, N, K, on: Target, block_q=None, block_k=None) -> Static:
    """Block sizes from blocks.py, if not given, no longer than the input needs. NotImplementedError if nothing fits."""
    row, G = block_sizes(BLOCKS, on, tpu_shape_class(S)), N // K
    block_q = block_q or min(row["block_q"], max(LANES, row["columns"] // G // LANES * LANES), _filled(T))
    sizes = {name: Sizes(block_q, block_k or min(row[f"{name}_k"], _filled(S))) for name in PROGRAMS}
    for name, size in sizes.items():
        _slabs(name, size, A, B, T, S)
    return Static(**sizes, interpret=on.interpret)


def _filled(length):
    return -(-length // LANES) * LANES


def attend(rotations, k, v, masks: Masks, **block_sizes):
    """Attention of the rotated queries, a tuple of A arrays [B, T, N, H], over k and v [B, S, K, H].

    Returns (out [B, T, N, H] in the query's dtype, lse float32 [B, T, N]). Differentiable in rotations, k, v and
    masks.scale_B, from both results. block_q and block_k may be given, else they come from blocks.py.

    Raises:
        NotImplementedError: not a TPU, not all arrays in bfloat16 or all in float32, a head width other than 64 and
            128, an empty array, or a list of visits of which not even one row fits into scalar memory.
    """
    on = require("tpu")
    (B, T, N, H), (S, K), dtype = rotations[0].shape, k.shape[1:3], rotations[0].dtype
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    if dtype not in (jnp.bfloat16, jnp.float32) or any(x.dtype != dtype for x in (*rotations, k, v)):
        found = ", ".join(str(x.dtype) for x in (*rotations, k, v))
        raise NotImplementedError(f"needs queries, k and v all in bfloat16 or all in float32, got {found}")
    if 0 in (B, T, S):
        raise NotImplementedError(f"needs at least one query and one key, got batch {B}, {T} queries, {S} keys")
    static = _static(len(rotations), B, T, S, N, K, on, **block_sizes)
    return _attend_jit(static, tuple(rotations), k, v, masks)


# ---------------------------------------------------------------------- counting


def count(
    B, T, S, N, K, H, *, on: Target, dtype=jnp.bfloat16, chunk_len=None, window=None, positions_BT=None, **block_sizes
) -> dict[str, Count]:
    """{"forward": .., "backward": ..} of a call without segments, from the list and blocks that the kernels are given.

    The keys are at positions 0..S-1 and the queries are the last T of them, unless positions_BT says otherwise.
    """
    static = _static(1 if chunk_len is None else CHUNK_REGIONS, B, T, S, N, K, on, **block_sizes)
    masks = last_queries(B, T, S, window=window, chunk_len=chunk_len, positions_BT=positions_BT)
    parts = {name: _count(name, getattr(static, name), masks, N, K, H, dtype) for name in PROGRAMS}
    dq, dkv = parts["dq"], parts["dkv"]
    added = Count(dq.flops + dkv.flops, dq.hbm_bytes + dkv.hbm_bytes, max(dq.fast_memory_bytes, dkv.fast_memory_bytes))
    return {"forward": parts["forward"], "backward": added}


def _count(name, sizes: Sizes, masks: Masks, N, K, H, dtype) -> Count:
    (B, T), S = masks.q.positions.shape, masks.kv.positions.shape[1]
    A, I, J = 1 if masks.chunk_len_B is None else CHUNK_REGIONS, -(-T // sizes.block_q), -(-S // sizes.block_k)
    program = PROGRAMS[name](Shape(A, B, K, N // K, H, 1, I, J, jnp.dtype(dtype)), sizes)
    visits = jax.jit(_visits, static_argnums=(0, 1))(program.walk, sizes, masks)
    entries = int(visits.starts[-1])
    words = np.asarray(visits.words_Z[:entries])

    def block_of(spec):
        return [1 if size is None else size for size in spec.block_shape]

    def moved(spec, of):
        """Bytes between HBM and VMEM: a block is moved whenever an entry needs another than the one before it."""
        index = np.stack(np.broadcast_arrays(*spec.index_map(0, np.arange(entries), words)), axis=1)
        times = 1 + int(np.any(index[1:] != index[:-1], axis=1).sum())
        return times * math.prod(block_of(spec)) * of.dtype.itemsize

    def held(block, dtype):  # tiles of registers: 128 lanes, and 8 rows of 4 bytes, 16 of 2
        rows, lanes = block[-2:]
        tile = (8 if rows > 1 else 1) * 4 // dtype.itemsize
        return math.prod(block[:-2]) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * dtype.itemsize

    ends = list(zip(program.inputs + program.outputs, program.input_types + program.output_types, strict=True))
    return Count(
        flops=program.products * 2 * sizes.block_k * sizes.block_q * N * H * entries,
        hbm_bytes=K * sum(moved(spec, of) for spec, of in ends),
        fast_memory_bytes=2 * sum(held(block_of(spec), of.dtype) for spec, of in ends)
        + sum(held(x.shape, jnp.dtype(x.dtype)) for x in program.scratch),
    )
