# SPDX-License-Identifier: Apache-2.0
"""Dual Chunk Attention: causal attention beyond the trained length, three rotations of the query and one softmax."""

from ..dispatch import dispatch, late
from ..masks import make_masks
from . import reference, xla

IMPLEMENTATIONS = {  # fastest first
    "tpu": late(f"{__name__}.tpu", "attend", "tpu"),
    "gpu": late(f"{__name__}.gpu", "attend", "gpu"),
    "xla": xla.dual_chunk_attention,
    "reference": reference.dual_chunk_attention,
}


def dual_chunk_attention(
    q,
    q_succ,
    q_inter,
    k,
    v,
    *,
    chunk_len,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window=None,
    scale=None,
    return_lse=False,
    implementation=None,
):
    """Attention in which the chunk of the key chooses the rotation of the query (An et al. 2024, arXiv:2402.17463).

    With chunk number = position // chunk_len, a key in the query's own chunk is scored with q, one in the chunk before
    with q_succ, an older one with q_inter; one softmax runs over all of them. The caller makes the rotations, all
    [B, T, N, H]: for chunk size c and local size w, chunk_len is c - w, keys are rotated at position % chunk_len, q at
    position % chunk_len, q_succ at min(position % chunk_len + chunk_len, c), q_inter at min(2 * chunk_len - 1, c).

    `chunk_len` is a number or one per batch row; where it exceeds every position this is flash_attention of q, bit for
    bit in the same implementation. Everything else is as in flash_attention: what is visible, window, scale,
    return_lse, the zero rows, dtypes, gradients (also of q_succ and q_inter), errors.
    """
    queries = {"q": q, "q_succ": q_succ, "q_inter": q_inter}
    masks = make_masks(
        queries,
        k,
        v,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        window=window,
        chunk_len=chunk_len,
        scale=scale,
    )
    rotations = q, q_succ, q_inter
    out, lse_BTN = dispatch("dual_chunk_attention", IMPLEMENTATIONS, implementation, rotations, k, v, masks)
    return (out, lse_BTN) if return_lse else out
