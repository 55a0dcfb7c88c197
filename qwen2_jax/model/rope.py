# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: plain RoPE, YaRN (yarn.py) and Dual Chunk Attention, all as run-time arrays.

One compiled program serves every kind of request, because they differ in numbers, not in code: the frequencies (YaRN
lowers the slow ones), the chunk length (plain attention is one endless chunk) and the factor on the logits. Each row of
a batch has its own.

Dual Chunk Attention (An et al. 2024, arXiv:2402.17463; positions as in the Qwen authors' code) cuts a sequence every
s = chunk_size - local_size tokens. A key at position j is always rotated by j mod s. A query at position i is rotated
three ways, and the key's chunk decides which of the three it is multiplied with:

    key in the query's own chunk     i mod s                      exact distance i - j
    key in the chunk before          min(i mod s + s, chunk_size)  exact for the nearest local_size keys
    key in an older chunk            min(2s - 1, chunk_size)       one constant, larger than any distance above
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config.model_config import FULL, DualChunk, ModelConfig, RopeScaling
from qwen2_jax.errors import UserError
from qwen2_jax.model import yarn

# A rotations  B batch (1 serves every row)  T query  N heads  H head width  f = H / 2 frequencies
LongContext = Literal["auto", "off", "yarn", "dca"]
MODES: tuple[LongContext, ...] = ("auto", "off", "yarn", "dca")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions enter attention, one entry per row of the batch or one for all rows.

    inv_freq_Bf: float32 [B, H/2], radians per token.
    amplitude_B: float32 [B], factor on the attention logits (the square of YaRN's factor on cos and sin; 1 without).
        It multiplies logits and not cached keys, so that a cache does not depend on it.
    chunk_len_B: int32 [B], s of Dual Chunk Attention; FULL is one endless chunk, ordinary attention.
        None: the same, known at compile time, so that the two extra query rotations are not traced.
    chunk_size_B: int32 [B], the largest distance that Dual Chunk Attention uses.
    original_length_B: float32 [B], the context length that the model was trained on; Dual Chunk Attention
        multiplies the logits of longer contexts by a factor that grows with their length. 0: no such factor.
    """

    inv_freq_Bf: jax.Array
    amplitude_B: jax.Array
    chunk_len_B: jax.Array | None
    chunk_size_B: jax.Array
    original_length_B: jax.Array

    def logit_scale(self, context_B: jax.Array) -> jax.Array:
        """Factor on the logits of rows that hold context_B tokens: amplitude * f(n)^2, float32 [B].

        f(n) = max(1, 0.1 ln(n / original_length) + 1) (Qwen2.5-1M report, arXiv:2501.15383, sec. 5.1, eq. 1).
        """
        ratio_B = context_B / jnp.maximum(self.original_length_B, 1.0)
        f_B = jnp.maximum(1.0, 0.1 * jnp.log(jnp.maximum(ratio_B, 1.0)) + 1.0)
        return self.amplitude_B * jnp.where(self.original_length_B > 0, f_B * f_B, 1.0)

    def angles(self, positions_BT: jax.Array) -> "Angles":
        """The rotations of this call's tokens. Negative positions (padding) give finite angles that are not used."""
        if self.chunk_len_B is None:
            index_ABT = positions_BT[None]
        else:
            s_B1, c_B1 = self.chunk_len_B[:, None], self.chunk_size_B[:, None]
            own_BT = positions_BT % s_B1
            inter_BT = jnp.broadcast_to(jnp.minimum(2 * s_B1 - 1, c_B1), own_BT.shape)
            index_ABT = jnp.stack([own_BT, jnp.minimum(own_BT + s_B1, c_B1), inter_BT])
        angle_ABTf = index_ABT.astype(jnp.float32)[..., None] * self.inv_freq_Bf[:, None, :]
        return Angles(jnp.cos(angle_ABTf), jnp.sin(angle_ABTf))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Angles:
    """cos and sin of the rotations, float32 [A, B, T, H/2]: A = 1, or 3 with chunks (own, one before, older)."""

    cos_ABTf: jax.Array
    sin_ABTf: jax.Array

    def queries(self, q_BTNH: jax.Array) -> tuple[jax.Array, ...]:
        """The query in all A rotations."""
        return tuple(_rotate(q_BTNH, self.cos_ABTf, self.sin_ABTf))

    def keys(self, k_BTKH: jax.Array) -> jax.Array:
        """The key in the one rotation it has, that of its position in its own chunk."""
        return _rotate(k_BTKH, self.cos_ABTf[0], self.sin_ABTf[0])


def _rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimension i against i + H/2, as Qwen2's weights expect. Computed in float32, returned in x's dtype."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def plain_frequencies(head_dim: int, *, theta: float) -> np.ndarray:
    """theta^(-2i / head_dim), float32 [H/2], radians per token (Su et al. 2021, arXiv:2104.09864)."""
    return (theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)).astype(np.float32)


def dual_chunk_defaults(trained_length: int) -> DualChunk:
    """Sizes where the config gives none: chunk 32768, local 512 and trained length 32768, or in that ratio."""
    return DualChunk(
        chunk_size=trained_length,
        local_size=max(1, trained_length * 512 // 32768),
        original_max_position_embeddings=trained_length,
    )


def plain(config: ModelConfig) -> Rope:
    """Ordinary attention for every row, known at compile time. The default of training."""
    return dataclasses.replace(stacked([_plain_row(config)]), chunk_len_B=None)


def choose(config: ModelConfig, lengths: int | Sequence[int], mode: LongContext = "auto") -> Rope:
    """The rotary arrays for rows that will hold `lengths` tokens (prompt and answer together).

    mode "auto": plain up to config.trained_length, or the chunk_size of a dual_chunk_attention_config that is shorter;
    beyond it what the config says (dual_chunk_attention_config, else rope_scaling of type yarn), and Dual Chunk
    Attention with `dual_chunk_defaults` where it says nothing.
    "off": plain at any length. "yarn": YaRN at any length with the config's factor, as transformers applies it; where
    the config has none, with the factor length / trained_length. "dca": Dual Chunk Attention at any length.
    A length of at most the chunk size is plain attention under "dca" too.
    """
    if mode not in MODES:
        raise UserError(f"long_context={mode!r}; choose one of {', '.join(map(repr, MODES))}")
    rows = np.atleast_1d(np.asarray(lengths)).tolist()
    return stacked([row(config, int(n), mode) for n in rows])


def row(config: ModelConfig, length: int, mode: LongContext) -> "Row":
    """The entry of one row that will hold `length` tokens; see `choose`."""
    scaling = config.rope_scaling
    has_yarn = scaling is not None and scaling.type == "yarn"
    if mode == "auto":
        chunk = config.dual_chunk_attention_config
        if length <= min(config.trained_length, chunk.chunk_size if chunk else FULL):
            mode = "off"
        elif has_yarn and config.dual_chunk_attention_config is None:
            mode = "yarn"
        else:
            mode = "dca"
    if mode == "off":
        return _plain_row(config)
    if mode == "yarn":
        return _yarn_row(config, yarn.scaling_for(config, length))
    chunk = config.dual_chunk_attention_config or dual_chunk_defaults(config.trained_length)
    inv_freq = _plain_row(config)[0]
    return Row(
        inv_freq,
        1.0,
        chunk.chunk_size - chunk.local_size,
        chunk.chunk_size,
        chunk.original_max_position_embeddings or 0,
    )


def _plain_row(config: ModelConfig) -> "Row":
    inv_freq = plain_frequencies(config.head_dim, theta=config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        inv_freq = inv_freq / np.float32(config.rope_scaling.factor)  # trained with it: part of the model at any length
    return Row(inv_freq, 1.0, FULL, FULL, 0)


def _yarn_row(config: ModelConfig, scaling: RopeScaling) -> "Row":
    inv_freq = yarn.frequencies(
        config.head_dim,
        theta=config.rope_theta,
        factor=scaling.factor,
        original_length=scaling.original_max_position_embeddings or config.max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        truncate=scaling.truncate,
    )
    return Row(inv_freq, yarn.attention_factor(scaling) ** 2, FULL, FULL, 0)


class Row(NamedTuple):
    """A Rope's entry for one row, in numpy's numbers."""

    inv_freq_f: np.ndarray
    amplitude: float
    chunk_len: int
    chunk_size: int
    original_length: float


def stacked(rows: Sequence[Row]) -> Rope:
    inv_freq, amplitude, chunk_len, chunk_size, original = zip(*rows, strict=True)
    return Rope(
        inv_freq_Bf=jnp.asarray(np.stack(inv_freq)),
        amplitude_B=jnp.asarray(amplitude, jnp.float32),
        chunk_len_B=jnp.asarray(chunk_len, jnp.int32),
        chunk_size_B=jnp.asarray(chunk_size, jnp.int32),
        original_length_B=jnp.asarray(original, jnp.float32),
    )
