# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: one function per operation of the model, implementations chosen by name.

A kernel sees the arrays of one device. Where the caller is traced on a mesh (sharding.on), every operation here runs in
a shard_map: rows of the batch, heads and experts are split as sharding.RULES says, and what a dimension's size does not
allow is not split. Attention needs no communication then; the experts' outputs are summed over the devices that hold
different experts, or different parts of one.

`implementation` is None (the best that serves the device), one name for all operations ("xla"), or names by operation
("attention=splash,experts=ragged_dot"; those left out take the best that serves).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen2_jax import sharding
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

__all__ = ["attention", "cached_attention", "check_implementation", "experts"]

# R layers of a cache  B batch  T query  S key  N query heads  K kv heads  H head width
# M tokens  k experts of a token  E experts  F width of an expert
Names = Sequence[str | None]

FEW_QUERIES = 8  # up to this many queries per row, attention over a cache is a decode step, not a prefill

# What `implementation` may name, by operation. Names that only ordinary attention has are refused by dual chunk.
OPERATIONS = {
    "attention": (*_flash.IMPLEMENTATIONS, *_flash.ONLY_BY_NAME),
    "decode": (*_decode.IMPLEMENTATIONS,),
    "experts": (*_grouped.IMPLEMENTATIONS, *_grouped.ONLY_BY_NAME),
}

QUERY = ("batch", None, "heads", "head_dim")
KEY = ("batch", None, "kv_heads", "head_dim")
CACHE = ("layers", "batch", "kv_heads", None, "head_dim")
TOKENS = ("batch", None)
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
        return spec
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

    name = _implementation("attention", implementation)

    def run(queries, k_BSKH, v_BSKH, masks, numbers):
        masks = dict(zip(("q_positions_BT", "kv_positions_BS", "q_segments_BT", "kv_segments_BS"), masks, strict=True))
        window, scale, chunk_len = numbers
        common = {**masks, "window": window, "scale": scale, "implementation": name}
        if len(queries) == 1:
            return _flash.flash_attention(*queries, k_BSKH, v_BSKH, **common)
        return dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, **common)

    masks = (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    numbers = (window, scale, None if len(queries) == 1 else chunk_len)
    args = (queries, k_BSKH, v_BSKH, masks, _per_row(numbers, len(k_BSKH)))
    return _on_each_device(run, args, (QUERY, KEY, KEY, TOKENS, ROW), QUERY, name)


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
    R, B, _, S, _ = k_RBKSH.shape
    if q_positions_BT.shape[1] > FEW_QUERIES:
        return attention(
            queries, k_RBKSH[repeat].swapaxes(1, 2), v_RBKSH[repeat].swapaxes(1, 2), q_positions_BT=q_positions_BT,
            kv_positions_BS=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)),
            chunk_len=chunk_len, window=window, scale=scale, implementation=implementation,
        )  # fmt: skip

    name = _implementation("decode", implementation)

    def run(queries, k_RBKSH, v_RBKSH, q_positions_BT, numbers, repeat):
        window, scale, chunk_len = numbers
        q, succ, inter = queries if len(queries) == 3 else (*queries, None, None)
        # A kernel's input is a whole array: a slice of the cache would be copied at every step. So the layers' rows are
        # handed over as pages of S slots, of which each row has one.
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k_RBKSH, v_RBKSH))
        B = k_RBKSH.shape[1]
        pages_B1 = None if R == 1 else (repeat * B + jnp.arange(B, dtype=jnp.int32))[:, None]
        return _decode.decode_attention(
            q, succ, inter, k, v, q_positions_BT=q_positions_BT, block_table_BP=pages_B1,
            chunk_len=chunk_len, window=window, scale=scale, implementation=name,
        )  # fmt: skip

    numbers = (window, scale, None if len(queries) == 1 else chunk_len)
    args = (queries, k_RBKSH, v_RBKSH, q_positions_BT, _per_row(numbers, B), jnp.asarray(repeat, jnp.int32))
    return _on_each_device(run, args, (QUERY, CACHE, CACHE, TOKENS, ROW, ()), QUERY, name)


def experts(
    x_MD: jax.Array,
    chosen_Mk: jax.Array,
    weights_Mk: jax.Array,
    gate_EFD: jax.Array,
    up_EFD: jax.Array,
    down_EDF: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """sum over a token's k experts e of weight_e * down_e(silu(gate_e x) * up_e x), [M, D] in x's dtype.

    chosen_Mk: experts of each token; E or more means none (padding). Nothing is dropped, whatever the load. On a mesh
    every device runs the experts it holds for the tokens of its batch shard, and the partial sums are added in float32.
    """
    args = (x_MD, chosen_Mk, weights_Mk, gate_EFD, up_EFD, down_EDF)
    names = (("batch", None),) * 3 + (("experts", "mlp", None),) * 2 + (("experts", None, "mlp"),)
    axes = _axes(args, names)
    summed = (*axes.get("experts", ()), *axes.get("mlp", ()))

    name = _implementation("experts", implementation)

    def run(x_MD, chosen_Mk, weights_Mk, gate_EFD, up_EFD, down_EDF):
        mine = len(gate_EFD)
        if axes.get("experts"):  # another device's experts are none of mine: their rows cost nothing and give zeros
            chosen_Mk = chosen_Mk - jax.lax.axis_index(axes["experts"]) * mine
        order = sort_by_expert(chosen_Mk, mine)
        rows = permute(x_MD, order)
        hidden = _grouped.grouped_swiglu(rows, gate_EFD, up_EFD, order.group_sizes_E, implementation=name)
        rows = _grouped.grouped_matmul(hidden, down_EDF, order.group_sizes_E, transpose_w=True, implementation=name)
        y_MD = unpermute(rows, weights_Mk, order)
        return jax.lax.psum(y_MD.astype(jnp.float32), summed).astype(y_MD.dtype) if summed else y_MD

    return _on_each_device(run, args, names, ("batch", None), name)


# ---------------------------------------------------------------------- from logical names to one device's share


def _per_row(numbers, B: int):
    """Numbers as [B], so that they are split with the batch; None stays None."""
    return tuple(None if x is None else jnp.broadcast_to(jnp.asarray(x), (B,)) for x in numbers)


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
    if "kv_heads" in axes:
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
