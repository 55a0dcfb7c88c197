# SPDX-License-Identifier: Apache-2.0
"""Causal attention by NVIDIA's cuDNN, for the simplest case: every row of the batch is tokens 0, 1, ... T-1, no more.

cuDNN's mask is a flag: query t sees keys 0..t. So it cannot express padding, packing, a cache longer than the queries
or a window. Positions are run-time data, which cannot be checked while tracing; so this implementation is never chosen
by `implementation=None`, and the caller who names it guarantees the positions.

jax.nn.dot_product_attention would round the log-sum-exp to the query's dtype; the call underneath keeps float32.
"""

import jax
import jax.numpy as jnp

from ..masks import Masks
from ..target import require


def flash_attention(rotations, k, v, masks: Masks):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]), of rows at positions 0, 1, ... T-1.

    Differentiable in q, k, v and masks.scale_B, from out alone: cuDNN takes no cotangent of lse.

    Raises:
        NotImplementedError: not a GPU, T != S, segments, a window, not 16 bit, or a head width that cuDNN has not.
    """
    on, (q,) = require("gpu"), rotations
    (T, width), S = (q.shape[1], q.shape[3]), k.shape[1]
    if T != S:
        raise NotImplementedError(f"needs as many queries as keys, got {T} and {S}")
    if masks.q.segments is not None or masks.window_B is not None:
        raise NotImplementedError("needs one segment and no window")
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}, {k.dtype} and {v.dtype}")
    widest = 256 if on.generation == "hopper" else 128
    if width % 8 or width > widest:
        raise NotImplementedError(f"needs a head width that is a multiple of 8, at most {widest}, got {width}")
    if on.interpret:
        raise NotImplementedError("needs a real GPU: Pallas's interpreter has no cuDNN")
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention  # imported when needed
    except ImportError as why:
        raise NotImplementedError(f"this version of jax calls cuDNN in another way ({why})") from why

    # cuDNN's scale is fixed when compiling, ours is a run-time number per row: the quotient goes into the query, where
    # it is exactly 1 for the usual scale, and otherwise rounds the query once more.
    usual = width**-0.5
    q = (q.astype(jnp.float32) * (masks.scale_B / usual)[:, None, None, None]).astype(q.dtype)
    out, lse_BNT = dot_product_attention(q, k, v, scale=usual, mask_type=MaskType.CAUSAL, return_residual=True)
    return out, _without_gradient(lse_BNT.swapaxes(1, 2))


@jax.custom_vjp
def _without_gradient(lse):
    return lse


def _refuse(_, cotangent):
    raise NotImplementedError('cuDNN gives no gradient of the log-sum-exp: use implementation="gpu" or "xla"')


_without_gradient.defvjp(lambda lse: (lse, None), _refuse)
