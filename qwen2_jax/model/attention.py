# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with rotary positions, with or without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model.kv_cache import LayerCache, balance
from qwen2_jax.model.rope import Angles, Rope
from qwen2_jax.weights.params import Declare
from qwen2_jax.weights.weight import dequantize, matmul

# B batch  T query  S key/cache  D model  N query heads  K kv heads  H head width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Positions, segments and rotary angles of one call's tokens: computed once, used by every layer.

    positions_BT: int32, position in the row; negative is padding. segments_BT: documents packed in one row, or None.
    angles: their rotary angles. chunk_len_B, scale_B: see Rope; scale_B includes 1 / sqrt(H).
    pages: where the tokens lie in a paged cache; None where the cache is none.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    angles: Angles
    chunk_len_B: jax.Array | None
    scale_B: jax.Array
    pages: ops.PageLayout | None
    implementation: str | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def locate(
        cls, rope: Rope, positions_BT, segments_BT, context_B, head_dim: int, implementation=None, pages=None
    ) -> "Tokens":
        """From the arguments of Qwen2.__call__; context_B None: the largest position of each row + 1."""
        if context_B is None:
            context_B = positions_BT.max(axis=1) + 1
        scale_B = jnp.broadcast_to(rope.logit_scale(context_B) * head_dim**-0.5, positions_BT.shape[:1])
        chunk_len_B = rope.chunk_len_B
        if chunk_len_B is not None:
            chunk_len_B = jnp.broadcast_to(chunk_len_B, positions_BT.shape[:1])
        return cls(positions_BT, segments_BT, rope.angles(positions_BT), chunk_len_B, scale_B, pages, implementation)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v with N query heads sharing K kv heads in groups; q, k and v are biased, o is not."""

    def __init__(self, config: ModelConfig, declare: Declare):
        D, H = ("embed", config.hidden_size), ("head_dim", config.head_dim)
        N, K = ("heads", config.num_attention_heads), ("kv_heads", config.num_key_value_heads)
        wide, narrow = N[1] * H[1], K[1] * H[1]
        self.wq_NHD = declare(N, H, D, hf="self_attn.q_proj.weight", hf_shape=(wide, D[1]))
        self.wk_KHD = declare(K, H, D, hf="self_attn.k_proj.weight", hf_shape=(narrow, D[1]))
        self.wv_KHD = declare(K, H, D, hf="self_attn.v_proj.weight", hf_shape=(narrow, D[1]))
        self.wo_DNH = declare(D, N, H, hf="self_attn.o_proj.weight", hf_shape=(D[1], wide))
        self.qkv_bias = config.qkv_bias
        if config.qkv_bias:
            self.bq_NH = declare(N, H, hf="self_attn.q_proj.bias", hf_shape=(wide,), init="zeros")
            self.bk_KH = declare(K, H, hf="self_attn.k_proj.bias", hf_shape=(narrow,), init="zeros")
            self.bv_KH = declare(K, H, hf="self_attn.v_proj.bias", hf_shape=(narrow,), init="zeros")

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, window, cache: LayerCache | None, repeat
    ) -> tuple[jax.Array, LayerCache | None]:
        """window: int32, keys that a token sees, itself included; None: all. repeat: the layer's index in `cache`."""
        q_BTNH = matmul(x_BTD, self.wq_NHD[...])
        k_BTKH = matmul(x_BTD, self.wk_KHD[...])
        v_BTKH = matmul(x_BTD, self.wv_KHD[...])
        if self.qkv_bias:
            q_BTNH, k_BTKH, v_BTKH = q_BTNH + self.bq_NH[...], k_BTKH + self.bk_KH[...], v_BTKH + self.bv_KH[...]

        queries = tokens.angles.queries(q_BTNH)
        k_BTKH = tokens.angles.keys(k_BTKH)

        common = {
            "chunk_len": tokens.chunk_len_B,
            "window": window,
            "scale": tokens.scale_B,
            "implementation": tokens.implementation,
        }
        if cache is None:
            out_BTNH = ops.attention(
                queries,
                k_BTKH,
                v_BTKH,
                q_positions_BT=tokens.positions_BT,
                kv_positions_BS=tokens.positions_BT,
                q_segments_BT=tokens.segments_BT,
                kv_segments_BS=tokens.segments_BT,
                **common,
            )
        else:
            if cache.scales and self.qkv_bias:
                steps_KH = balance(dequantize(self.wk_KHD[...]), self.bk_KH[...]).astype(k_BTKH.dtype)
                k_BTKH = k_BTKH / steps_KH
                steps_NH = jnp.repeat(steps_KH, q_BTNH.shape[2] // len(steps_KH), axis=0)
                queries = tuple(rotated * steps_NH for rotated in queries)
            cache = cache.write(repeat, k_BTKH, v_BTKH, tokens.positions_BT, tokens.pages)
            out_BTNH = cache.attend(queries, repeat, tokens.positions_BT, tokens.pages, **common)
        return matmul(out_BTNH, self.wo_DNH[...], contract=2), cache
