# SPDX-License-Identifier: Apache-2.0
"""jax's own splash attention for TPUs, for the plain case, by name only.

Its mask is fixed while tracing and follows the order of tokens, so positions are ignored. The caller guarantees:

* queries and keys are the same tokens (T == S), and their positions ascend within each segment;
* with packed documents, segments are given;
* padding (negative positions) comes after everything else in its row.

Then a query sees the keys of earlier tokens, and results are those of the other implementations. Its softmax scale is
1, so q is multiplied by the scale and rounded to its dtype. The log-sum-exp is computed by a second run, which jit
removes where it is not used, and is not differentiable: gradients through it are NaN.

B batch, T tokens, N query heads, K kv heads, H head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from ..dual_chunk_attention.blocks import BLOCKS
from ..masks import Masks
from ..target import block_sizes, require


def flash_attention(rotations, k, v, masks: Masks, *, block=None):
    """Returns (out [B, T, N, H] in q's dtype, lse float32 [B, T, N]). The positions of the keys are not read."""
    on, (q,) = require("tpu"), rotations
    (_, T, N, H), S = q.shape, k.shape[1]
    if H not in (64, 128):
        raise NotImplementedError(f"needs a head width of 64 or 128, got {H}")
    if T != S:
        raise NotImplementedError(f"needs as many queries as keys, the same tokens, got {T} and {S}")
    if masks.window_B is not None:
        raise NotImplementedError("needs window=None: its mask is fixed while tracing")

    block = min(block or block_sizes(BLOCKS, on, "tpu splash")["block"], -(-T // 128) * 128)
    missing = -T % block

    def heads_first(x_BTNH):
        return jnp.pad(x_BTNH, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)

    def filled(segments_BT):
        return jnp.pad(segments_BT, ((0, 0), (0, missing)), constant_values=-1).astype(jnp.int32)

    q_BNTH = heads_first((q.astype(jnp.float32) * masks.scale_B[:, None, None, None]).astype(q.dtype))
    inputs: tuple = (q_BNTH, heads_first(k), heads_first(v))
    if masks.q.segments is not None:
        inputs += (splash.SegmentIds(filled(masks.q.segments), filled(masks.kv.segments)),)

    def kernel(save_residuals):
        mask = splash_masks.MultiHeadMask([splash_masks.CausalMask((T + missing, T + missing))] * N)
        passes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        sizes = splash.BlockSizes(**dict.fromkeys(passes, block))
        shards = {"head_shards": 1, "q_seq_shards": 1}
        interpret = {"block_sizes": sizes, "save_residuals": save_residuals, "interpret": on.interpret}
        return jax.vmap(splash.make_splash_mha(mask, **shards, **interpret))

    real_BT = masks.q.positions >= 0
    out = kernel(save_residuals=False)(*inputs).swapaxes(1, 2)[:, :T]
    (lse_BNT,) = kernel(save_residuals=True)(*jax.lax.stop_gradient(inputs))[1]
    lse_BTN = _without_gradient(lse_BNT.swapaxes(1, 2)[:, :T], q, k, masks.scale_B)
    out = jnp.where(real_BT[:, :, None, None], out, 0)
    return out, jnp.where(real_BT[:, :, None], lse_BTN, -jnp.inf)


@jax.custom_vjp
def _without_gradient(lse_BTN, *depends_on):
    """lse_BTN; its gradients with respect to q, k and the scale are NaN."""
    return lse_BTN


def _forward(lse_BTN, *depends_on):
    return lse_BTN, depends_on


def _backward(depends_on, dlse_BTN):
    asked = jnp.where(jnp.any(dlse_BTN != 0), jnp.nan, 0)
    return jnp.zeros_like(dlse_BTN), *(jnp.full_like(x, asked) for x in depends_on)


_without_gradient.defvjp(_forward, _backward)
