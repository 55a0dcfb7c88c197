# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: one function per operation of the model, implementations chosen by name.

A kernel sees the arrays of one device. Where the caller is traced on a mesh (sharding.on), every operation here runs in
a shard_map: rows of the batch, their tokens, heads and experts are split as sharding.RULES says, and what a dimension's
size does not allow is not split. Attention gathers keys and values over the devices that have other tokens of the same
rows, and needs nothing else. A cache is never gathered: devices that have other slots of the same rows attend over
their own, and the results are merged. Experts get their tokens from the devices that have them: exchange.py sends each
token to its experts, or all tokens are gathered where that moves fewer bytes.

`implementation` is None (the best that serves the device), one name for all operations ("xla"), or names by operation
("attention=splash,experts=ragged_dot"; those left out take the best that serves). "exchange=gather" or
"exchange=all_to_all" is how experts get tokens of other devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen2_jax import exchange, sharding
from qwen2_jax.errors import UserError

try:
    from qwen2_jax.kernels import decode_attention as _decode
    from qwen2_jax.kernels import flash_attention as _flash
    from qwen2_jax.kernels import grouped_matmul as _grouped
    from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
    from qwen2_jax.kernels.grouped_matmul import permute, sort_by_expert, unpermute
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}. The kernels live in the folder kernels/ and are installed as qwen2_jax.kernels: "
        "run `pip install -e .` in the clone"
    ) from missing

__all__ = ["attention", "cached_attention", "check_implementation", "exchange_of", "experts", "write_cache"]

# R layers of a cache  B batch  T query  S key  N query heads  K kv heads  H head width
# M tokens  k experts of a token  E experts  F width of an expert
Names = Sequence[str | None]

FEW_QUERIES = 8  # up to this many queries per row, attention over a cache is a decode step, not a prefill

# What `implementation` may name, by operation. Names that only ordinary attention has are refused by dual chunk.
KERNELS = {
    "attention": (*_flash.IMPLEMENTATIONS, *_flash.ONLY_BY_NAME),
    "decode": (*_decode.IMPLEMENTATIONS,),
    "experts": (*_grouped.IMPLEMENTATIONS, *_grouped.ONLY_BY_NAME),
}
OPERATIONS = {**KERNELS, "exchange": exchange.NAMES}

QUERY = ("batch", "length", "heads", None)
KEY = ("batch", "length", "kv_heads", None)
TOKENS = ("batch", "length")
STEP = ("batch", None, "heads", None)  # the queries of a decode step
CACHE = ("layers", "batch", "kv_heads", "slots", None)
ROW = ("batch",)


def check_implementation(spec: str | None) -> None:
    """Raises UserError where `spec` is nothing that `implementation` may be."""
    for operation, names in OPERATIONS.items():
        name = _implementation(operation, spec)
        if name is not None and name not in names:
            raise UserError(f"implementation={spec!r}: {operation} has no {name!r}; choose from {', '.join(names)}")


def _implementation(operation: str, spec: str | None) -> str | None:
    """The name that `spec` holds for one of OPERATIONS."""
    if spec is None or "=" not in spec:
        return spec if operation in KERNELS else None  # one name for all is a kernel's
    names = dict(part.partition("=")[::2] for part in spec.split(","))
    if not all(names.values()) or not set(names) <= set(OPERATIONS):
        allowed = ",".join(f"{name}=NAME" for name in OPERATIONS)
        raise UserError(f"implementation={spec!r}; give one name for all operations, or any of {allowed}")
    return names.get(operation)


def attention(
    queries: tuple[jax.Array, ...],
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    chunk_len=None,
    window=None,
    scale=None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over keys given with their positions: one query rotation (ordinary) or three (dual chunk).

    queries: (q_BTNH,) or (q_BTNH, q_succ_BTNH, q_inter_BTNH); chunk_len belongs to the three. window, chunk_len and
    scale are numbers or [B]. Returns [B, T, N, H].
    """

    masks = (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    numbers = (window, scale, None if len(queries) == 1 else chunk_len)
    args = (queries, k_BSKH, v_BSKH, masks, _per_row(numbers, len(k_BSKH)))
    names = (QUERY, KEY, KEY, TOKENS, ROW)
    pieces = _axes(args, names).get("length", ())
    name = _implementation("attention", implementation)

    def run(queries, k_BSKH, v_BSKH, masks, numbers):
        if pieces:
            # Grouped heads make the keys of a whole row small: with 7 or 8 queries to a key, less than its activations.
            whole = lambda x: jax.lax.all_gather(x, pieces, axis=1, tiled=True)  # noqa: E731
            q_at, kv_at, q_in, kv_in = masks
            k_BSKH, v_BSKH, kv_at, kv_in = jax.tree.map(whole, (k_BSKH, v_BSKH, kv_at, kv_in))
            masks = q_at, kv_at, q_in, kv_in
        masks = dict(zip(("q_positions_BT", "kv_positions_BS", "q_segments_BT", "kv_segments_BS"), masks, strict=True))
        window, scale, chunk_len = numbers
        common = {**masks, "window": window, "scale": scale, "implementation": name}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k_BSKH, v_BSKH, **common)
        return dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, **common)

    return _on_each_device(run, args, names, QUERY, name)


def cached_attention(
    queries: tuple[jax.Array, ...],
    k_RBKSH: jax.Array,
    v_RBKSH: jax.Array,
    repeat,
    *,
    q_positions_BT: jax.Array,
    chunk_len=None,
    window=None,
    scale=None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over layer `repeat` of a cache whose slot index is the position: a decode step, or a prefill chunk.

    Which of the two is decided by T. Everything else is as in `attention`.
    """
    few = q_positions_BT.shape[1] <= FEW_QUERIES
    queries = jax.tree.map(_before_weights, queries)
    name = _implementation("decode" if few else "attention", implementation)
    numbers = _per_row((window, scale, None if len(queries) == 1 else chunk_len), k_RBKSH.shape[1])
    args = (queries, k_RBKSH, v_RBKSH, q_positions_BT, numbers, jnp.asarray(repeat, jnp.int32))
    new, at = (STEP, ("batch", None)) if few else (QUERY, TOKENS)
    names = (new, CACHE, CACHE, at, ROW, ())
    axes = _axes(args, names)
    # Slots are divided in the order of their positions. So what a prompt's chunk costs is what the fullest share costs,
    # and until the last share fills up that is more than the mean: over a whole prompt up to twice as much, as is a
    # step of a cache that is half full. Taking turns by blocks of slots would even that out, but the kernels would then
    # have to know of it, and a cache is never less than half as long as what is asked for needs.
    shares, apart = axes.get("slots", ()), axes.get("length", ())

    def run(queries, k_RBKSH, v_RBKSH, q_positions_BT, numbers, repeat):
        if not shares:
            return _attend_to_cache(name, queries, k_RBKSH, v_RBKSH, repeat, q_positions_BT, *numbers)
        if apart:  # every device has some of the slots that each query sees
            gather = lambda x: jax.lax.all_gather(x, apart, axis=1, tiled=True)  # noqa: E731
            queries, q_positions_BT = jax.tree.map(gather, (queries, q_positions_BT))
        first = jax.lax.axis_index(shares) * k_RBKSH.shape[3]
        cache = (k_RBKSH, v_RBKSH, repeat)
        out, lse_BTN = _attend_to_cache(name, queries, *cache, q_positions_BT, *numbers, first=first, return_lse=True)
        return _merge(out, lse_BTN, shares, apart)

    out_BTNH = _on_each_device(run, args, names, new, name)
    return _before_weights(out_BTNH)


def write_cache(
    caches_RBKSH: tuple[jax.Array, ...],
    repeat,
    new_BTKH: tuple[jax.Array, ...],
    positions_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Each cache with its new tokens of layer `repeat` in the slots of their positions.

    A token whose position is negative (padding) or not below S is dropped, never written elsewhere. On a mesh every
    device writes what belongs in its own slots, so no part of a cache moves.
    """
    args = (caches_RBKSH, jax.tree.map(_before_weights, new_BTKH), positions_BT, jnp.asarray(repeat, jnp.int32))
    names = (CACHE, ("batch", None, "kv_heads", None), ("batch", None), ())
    shares = _axes(args, names).get("slots", ())

    def run(caches_RBKSH, new_BTKH, positions_BT, repeat):
        S = caches_RBKSH[0].shape[3]
        slots_BT = positions_BT - jax.lax.axis_index(shares) * S if shares else positions_BT
        slots_BT = jnp.where(slots_BT < 0, S, slots_BT)
        where = (repeat, jnp.arange(len(positions_BT))[:, None], slice(None), slots_BT)
        write = lambda cache, new: cache.at[where].set(new.astype(cache.dtype), mode="drop")  # noqa: E731
        return jax.tree.map(write, caches_RBKSH, new_BTKH)

    return _on_each_device(run, args, names, CACHE, None)


def _attend_to_cache(
    name, queries, k_RBKSH, v_RBKSH, repeat, q_positions_BT, window, scale, chunk_len, first=0, return_lse=False
):
    """One device's part of cached_attention: slot 0 holds the position `first`."""
    R, B, _, S, _ = k_RBKSH.shape
    common = {"window": window, "scale": scale, "return_lse": return_lse, "implementation": name}
    if q_positions_BT.shape[1] > FEW_QUERIES:
        k_BSKH, v_BSKH = (x[repeat].swapaxes(1, 2) for x in (k_RBKSH, v_RBKSH))
        slots_BS = jnp.broadcast_to(first + jnp.arange(S, dtype=jnp.int32), (B, S))
        common |= {"q_positions_BT": q_positions_BT, "kv_positions_BS": slots_BS}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k_BSKH, v_BSKH, **common)
        return dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, **common)
    q, succ, inter = queries if len(queries) == 3 else (*queries, None, None)
    # A kernel's input is a whole array: a slice of the cache would be copied at every step. So the layers' rows are
    # handed over as pages of S slots, of which each row has one.
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k_RBKSH, v_RBKSH))
    pages_B1 = None if R == 1 else (repeat * B + jnp.arange(B, dtype=jnp.int32))[:, None]
    return _decode.decode_attention(
        q, succ, inter, k, v,
        q_positions_BT=q_positions_BT, block_table_BP=pages_B1, chunk_len=chunk_len, first=first, **common,
    )  # fmt: skip


def _merge(out_BTNH: jax.Array, lse_BTN: jax.Array, axes: tuple[str, ...], scatter: tuple[str, ...]) -> jax.Array:
    """One softmax of the devices along `axes`, each of which saw other keys; zeros where none saw any.

    Over the axes `scatter`, each device is left with its part of the queries.
    """
    top_BTN = jax.lax.pmax(jax.lax.stop_gradient(lse_BTN), axes)
    weight_BTN = jnp.exp(lse_BTN - jnp.where(top_BTN == -jnp.inf, 0, top_BTN))
    sums = out_BTNH.astype(jnp.float32) * weight_BTN[..., None], weight_BTN
    if scatter:
        sums = jax.tree.map(lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True), sums)
    else:
        sums = jax.lax.psum(sums, axes)
    total_BTNH, total_BTN = sums
    return (total_BTNH / jnp.where(total_BTN > 0, total_BTN, 1)[..., None]).astype(out_BTNH.dtype)


def experts(
    x_BTD: jax.Array,
    chosen_BTk: jax.Array,
    weights_BTk: jax.Array,
    gate_EFD: jax.Array,
    up_EFD: jax.Array,
    down_EDF: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """sum over a token's k experts e of weight_e * down_e(silu(gate_e x) * up_e x), [B, T, D] in x's dtype.

    chosen_BTk: experts of each token; E or more means none (padding). Nothing is dropped, whatever the load. On a mesh
    every device runs the experts it holds. Where devices that hold different experts have different tokens, copies of
    tokens go to their experts and results come back, or everybody gathers all tokens and the sums are scattered
    (exchange.choose). Tokens that they all have (a decode step's few rows) stay, and the sums are added. Partial sums
    are added in float32.
    """
    x_BTD, chosen_BTk, weights_BTk = map(_before_weights, (x_BTD, chosen_BTk, weights_BTk))
    args = (x_BTD, chosen_BTk, weights_BTk, gate_EFD, up_EFD, down_EDF)
    tokens = ("batch", "length", None)
    names = (tokens, tokens, tokens, ("experts", "mlp", None), ("experts", "mlp", None), ("experts", None, "mlp"))
    mesh, axes = sharding.current_mesh(), _axes(args, names)
    holders, widths = axes.get("experts", ()), axes.get("mlp", ())
    apart = tuple(axis for axis in holders if axis in axes.get("batch", ()))  # axes along which tokens differ too
    name, sent = _implementation("experts", implementation), None
    if mesh is not None and apart and apart == holders:
        devices = sharding.parts(holders, mesh)
        if exchange_of(implementation, devices, chosen_BTk.shape[-1], x_BTD.dtype.itemsize) == "all_to_all":
            sent = _Sent(name, len(gate_EFD), holders, tuple(mesh.axis_names))

    def run(x_BTD, chosen_BTk, weights_BTk, *matrices):
        if apart and sent is None:
            gather = lambda x: jax.lax.all_gather(x, apart, axis=0, tiled=True)  # noqa: E731
            x_BTD, chosen_BTk, weights_BTk = gather(x_BTD), gather(chosen_BTk), gather(weights_BTk)
        x_MD, chosen_Mk, weights_Mk = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, chosen_BTk, weights_BTk))
        if sent is not None:
            y_BTD = _sent(sent, x_MD, chosen_Mk, weights_Mk, *matrices).reshape(x_BTD.shape)
            return jax.lax.psum(y_BTD.astype(jnp.float32), widths).astype(y_BTD.dtype) if widths else y_BTD
        mine = len(matrices[0])
        if holders:  # another device's experts are none of mine: their rows cost nothing and give zeros
            chosen_Mk = chosen_Mk - jax.lax.axis_index(holders) * mine
        order = sort_by_expert(chosen_Mk, mine)
        rows = _products(name, permute(x_MD, order), matrices, order.group_sizes_E)
        y_BTD = unpermute(rows, weights_Mk, order).reshape(x_BTD.shape)
        if not holders and not widths:
            return y_BTD
        sums_BTD = y_BTD.astype(jnp.float32)
        if apart:
            sums_BTD = jax.lax.psum_scatter(sums_BTD, apart, scatter_dimension=0, tiled=True)
        elif holders:
            sums_BTD = jax.lax.psum(sums_BTD, holders)
        return (jax.lax.psum(sums_BTD, widths) if widths else sums_BTD).astype(y_BTD.dtype)

    return _before_weights(_on_each_device(run, args, names, tokens, name))


def exchange_of(implementation: str | None, devices: int, choices: int, itemsize: int) -> str:
    """Which of exchange.NAMES `experts` uses where so many devices have different tokens and different experts."""
    return exchange.choose(_implementation("exchange", implementation), devices, choices, itemsize)


def _products(name: str | None, rows_MD, matrices: Sequence, group_sizes_E, weights_M=None) -> jax.Array:
    """Each row through its expert, [M, D]; with weights_M times its weight."""
    gate_EFD, up_EFD, down_EDF = matrices
    hidden_MF = _grouped.grouped_swiglu(rows_MD, gate_EFD, up_EFD, group_sizes_E, implementation=name)
    if weights_M is not None:
        hidden_MF = (hidden_MF * weights_M[:, None]).astype(hidden_MF.dtype)
    return _grouped.grouped_matmul(hidden_MF, down_EDF, group_sizes_E, transpose_w=True, implementation=name)


class _Sent(NamedTuple):
    """What `_sent` has to know besides arrays."""

    name: str | None  # of the kernels
    experts: int  # E, on all devices together
    holders: tuple[str, ...]  # mesh axes over which experts and tokens are split
    everywhere: tuple[str, ...]  # all mesh axes

    def exchange(self, order, k: int) -> exchange.Exchange:
        """Of rows in this order, k for each token."""
        return exchange.Exchange.of(order.group_sizes_E, len(order.pairs_M) // k, k, self.holders, self.everywhere)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(how: _Sent, x_MD, chosen_Mk, weights_Mk, *matrices) -> jax.Array:
    """The weighted sums of one device's tokens, [M, D], through experts that other devices hold.

    matrices: gate, up and down of this device's experts. Kept for the backward pass are the arguments; it sends the
    tokens again, since what a device received is larger than what it has.
    """
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_RD = permute(x_MD, order)

    def do(part: exchange.Round, done_RD):
        return part.back(_products(how.name, part.there(rows_RD), matrices, part.group_sizes_E), done_RD)

    rows_RD = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, jnp.zeros_like(rows_RD))
    return unpermute(rows_RD, weights_Mk, order)


def _sent_forward(how: _Sent, *args):
    return _sent(how, *args), args


def _sent_backward(how: _Sent, args, dout_MD):
    """One more crossing than forward: tokens and gradients of their sums go, gradients of tokens come back.

    A row's weight goes with it and multiplies between the two products, which is the same function: its gradient is
    then found where the row is, and the results need not come home again.
    """
    x_MD, chosen_Mk, weights_Mk, *matrices = args
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_RD, to_tokens = jax.vjp(lambda x_MD: permute(x_MD, order), x_MD)
    dout_RD = permute(dout_MD, order)
    weights_R = weights_Mk.reshape(-1)[order.pairs_M].astype(jnp.float32)

    def do(part: exchange.Round, carry):
        drows_RD, dweights_R, *sums = carry

        def product(rows_CD, weights_C, *matrices):
            return _products(how.name, rows_CD, matrices, part.group_sizes_E, weights_C)

        _, pull = jax.vjp(product, part.there(rows_RD), part.numbers_there(weights_R), *matrices)
        drows_CD, dweights_C, *more = pull(part.there(dout_RD))
        # An expert's rows are together in one window, or in a few that follow each other: few terms for each sum.
        sums = jax.tree.map(jnp.add, sums, more)
        return [part.back(drows_CD, drows_RD), part.numbers_back(dweights_C, dweights_R), *sums]

    nothing = [jnp.zeros_like(x) for x in (rows_RD, weights_R, *matrices)]
    drows_RD, dweights_R, *dmatrices = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, nothing)
    dweights_Mk = dweights_R[order.rows_TK].astype(weights_Mk.dtype)
    return (*to_tokens(drows_RD), None, dweights_Mk, *dmatrices)


_sent.defvjp(_sent_forward, _sent_backward)


# ---------------------------------------------------------------------- from logical names to one device's share


def _per_row(numbers, B: int):
    """Numbers as [B], so that they are split with the batch; None stays None."""
    return tuple(None if x is None else jnp.broadcast_to(jnp.asarray(x), (B,)) for x in numbers)


def _before_weights(x_BT: jax.Array) -> jax.Array:
    """The same activations [B, T, ...], of a decode step on a mesh with rows divided as sharding.step_rows says.

    Said where activations come from products or go into some; else XLA divides them as the kernels between do.
    """
    mesh = sharding.current_mesh()
    if mesh is None or x_BT.shape[1] > FEW_QUERIES:
        return x_BT
    rows = sharding.step_rows(len(x_BT), mesh)
    free = (PartitionSpec.UNCONSTRAINED,) * (x_BT.ndim - 1)
    return jax.lax.with_sharding_constraint(x_BT, PartitionSpec(rows or None, *free))


def _axes(args: tuple, names: tuple[Names, ...]) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each named dimension is split: those of its rule that divide it in every array.

    All arrays of one argument have the same `names`. Query heads go with their key heads, or both stay whole.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return {}
    axes: dict[str, tuple[str, ...]] = {}
    for arg, of in zip(args, names, strict=True):
        for leaf in jax.tree.leaves(arg):
            for name, size in zip(of, leaf.shape, strict=True):
                if name is not None:
                    fits = sharding.dividing(name, size, mesh)
                    axes[name] = min(axes.get(name, fits), fits, key=len)
    if "heads" in axes and "kv_heads" in axes:
        axes["heads"] = axes["kv_heads"] = min(axes["heads"], axes["kv_heads"], key=len)
    return axes


def _on_each_device(run: Callable, args: tuple, names: tuple[Names, ...], out: Names, asked: str | None) -> Any:
    """run(*args), on a mesh with each device's share of args. `names` and `out` name the dimensions, as in `_axes`."""
    try:
        return _shared_out(run, args, names, out)
    except NotImplementedError as why:
        if asked is None:
            raise
        raise UserError(f"the implementation that was asked for {why}; name another, or none") from why


def _shared_out(run: Callable, args: tuple, names: tuple[Names, ...], out: Names) -> Any:
    mesh = sharding.current_mesh()
    if mesh is None:
        return run(*args)
    axes = _axes(args, names)

    def place(of):
        return PartitionSpec(*(axes.get(name) or None for name in of))

    specs = tuple(jax.tree.map(lambda _, of=of: place(of), arg) for arg, of in zip(args, names, strict=True))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=place(out), check_vma=False)(*args)
