# SPDX-License-Identifier: Apache-2.0
"""Causal attention with grouped heads, masks given as positions and segments, O(n) memory."""

from ..dispatch import dispatch, late
from ..masks import make_masks
from . import reference, xla

IMPLEMENTATIONS = {  # fastest first
    "tpu": late(f"{__name__}.tpu", "flash_attention", "tpu"),
    "gpu": late(f"{__name__}.gpu", "flash_attention", "gpu"),
    "xla": xla.flash_attention,
    "reference": reference.flash_attention,
}
ONLY_BY_NAME = {  # these need positions 0, 1, ... T-1, which only the caller can know
    "cudnn": late(f"{__name__}.cudnn", "flash_attention", "gpu"),
    "splash": late(f"{__name__}.splash", "flash_attention", "tpu"),
}


def flash_attention(
    q,
    k,
    v,
    *,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    window=None,
    scale=None,
    return_lse=False,
    implementation=None,
):
    """Softmax attention of q [B, T, N, H] over k, v [B, S, K, H]; N is a multiple of K, neighbouring heads share keys.

    A query sees a key iff both are in the same segment, key position <= query position, query position - key position
    < window, and both positions are >= 0 (negative marks padding). A query that sees nothing returns zeros.

    Args:
        q_positions_BT, kv_positions_BS: int positions in the sequence, below 2**30, in any order.
        q_segments_BT, kv_segments_BS: int segment ids, or None for one segment.
        window: how many tokens back a query sees, itself included; a number or one per batch row, None for all.
        scale: factor on the dot products, a number or one per batch row; None for 1 / sqrt(H).
        return_lse: return (out, lse) with lse float32 [B, T, N], the natural log of the sum of exp of the visible
            scaled logits, -inf where nothing is visible.
        implementation: "tpu" (bfloat16 or float32, H of 64 or 128), "gpu" (Hopper, bfloat16, H of 64 or 128), "xla"
            (by blocks, O(T + S) memory), "reference" (from the definition), or None for the first that takes the
            inputs. Two are taken by name alone, because they want T = S, every row at positions 0, 1, ... T-1, and no
            window, and give no gradient of lse: "cudnn", without segments, and "splash", jax's own TPU kernel.

    Returns out [B, T, N, H] in q's dtype; logits, softmax and sums are float32. Both results are differentiable in q,
    k, v and scale.

    Raises:
        ValueError: shapes do not fit, a window below 1 (where it is no traced array), or an unknown implementation.
        NotImplementedError: the named implementation cannot take these inputs.
    """
    masks = make_masks(
        {"q": q},
        k,
        v,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        window=window,
        scale=scale,
    )
    arguments = (q,), k, v, masks
    out, lse_BTN = dispatch("flash_attention", IMPLEMENTATIONS, implementation, *arguments, only_by_name=ONLY_BY_NAME)
    return (out, lse_BTN) if return_lse else out
