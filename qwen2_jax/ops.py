# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: one function per operation of the model, implementations chosen by name."""

import jax

try:
    from qwen2_jax.kernels.decode_attention import decode_attention as _decode_attention
    from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention as _dual_chunk_attention
    from qwen2_jax.kernels.flash_attention import flash_attention as _flash_attention
    from qwen2_jax.kernels.grouped_matmul import (
        grouped_matmul,
        grouped_swiglu,
        permute,
        sort_by_expert,
        unpermute,
    )
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}. The kernels live in the folder kernels/ and are installed as qwen2_jax.kernels: "
        "run `pip install -e .` in the clone"
    ) from missing

__all__ = [
    "attention",
    "cached_attention",
    "grouped_matmul",
    "grouped_swiglu",
    "permute",
    "sort_by_expert",
    "unpermute",
]

# B batch  T query  S key  N query heads  K kv heads  H head width
FEW_QUERIES = 8  # up to this many queries per row, attention over a cache is a decode step, not a prefill


def attention(
    queries: tuple[jax.Array, ...], k_BSKH: jax.Array, v_BSKH: jax.Array, *, chunk_len, implementation=None, **masks
) -> jax.Array:
    """Attention over keys given with their positions: one query rotation (ordinary) or three (dual chunk).

    queries: (q_BTNH,) or (q_BTNH, q_succ_BTNH, q_inter_BTNH). masks: q_positions_BT, kv_positions_BS, q_segments_BT,
    kv_segments_BS, window, scale. Returns [B, T, N, H].
    """
    if len(queries) == 1:
        return _flash_attention(*queries, k_BSKH, v_BSKH, implementation=implementation, **masks)
    return _dual_chunk_attention(*queries, k_BSKH, v_BSKH, chunk_len=chunk_len, implementation=implementation, **masks)


def cached_attention(
    queries: tuple[jax.Array, ...],
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    chunk_len,
    window,
    scale,
    implementation=None,
) -> jax.Array:
    """Attention over a cache whose slot index is the position: a decode step, or a prefill chunk if T is larger."""
    if q_positions_BT.shape[1] > FEW_QUERIES:
        return attention(
            queries, k_BSKH, v_BSKH, q_positions_BT=q_positions_BT, kv_positions_BS=kv_positions_BS,
            chunk_len=chunk_len, window=window, scale=scale, implementation=implementation,
        )  # fmt: skip
    q, succ, inter = queries if len(queries) == 3 else (*queries, None, None)
    return _decode_attention(
        q, succ, inter, k_BSKH, v_BSKH, q_positions_BT=q_positions_BT,
        chunk_len=chunk_len, window=window, scale=scale, implementation=implementation,
    )  # fmt: skip
