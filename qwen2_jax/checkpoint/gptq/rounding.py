# SPDX-License-Identifier: Apache-2.0
"""GPTQ's rounding of one weight matrix to 4 bits in groups (Frantar et al. 2022, arXiv:2210.17323), and its packing.

Columns are rounded from left to right. The error of each is moved into the columns that are not rounded yet, in the
way that changes the layer's outputs least on the calibration inputs: by the rows of U, upper triangular, with U^T U the
inverse of H = mean of x x^T over the inputs x. Without U it is plain rounding.

I inputs, O outputs, g inputs of a group, G groups.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

ZERO, LARGEST = 8, 15  # a weight is scale * (q - ZERO), q from 0 to LARGEST
CLIPS = np.linspace(0.6, 1.0, 21, dtype=np.float32)  # shares of a group's range that are tried
TINY = 2.0**-24  # the smallest float16 above zero
PER_WORD = 8
V1_ZEROS = 0x77777777  # ZERO - 1 in each of a word's 4-bit places, as version 1 of the format stores zeros


@jax.jit
def factor(h_II: jax.Array, damp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(U, which inputs are dead). damp: share of the mean of H's diagonal that is added to the diagonal.

    Inputs that are always zero are dead: any weight of theirs would do. U is not finite where H is too near singular.
    """
    diagonal_I = jnp.diagonal(h_II)
    dead_I = diagonal_I <= 0
    mean = jnp.sum(diagonal_I) / jnp.maximum(1, jnp.sum(~dead_I))
    added_I = damp * mean + jnp.where(dead_I, jnp.where(mean > 0, mean, 1), 0)
    # With R upper triangular and H = R R^T, U is R's inverse. Cholesky's factor is lower: hence from the last row on.
    lower_II = jnp.linalg.cholesky((h_II + jnp.diag(added_I))[::-1, ::-1])
    eye_II = jnp.eye(len(h_II), dtype=h_II.dtype)
    return jax.scipy.linalg.solve_triangular(lower_II[::-1, ::-1], eye_II, lower=False), dead_I


@partial(jax.jit, static_argnames="group")
def rounded(w_OI: jax.Array, u_II: jax.Array | None, group: int) -> tuple[jax.Array, jax.Array]:
    """(q uint8 [O, I], scale float16 [O, G]) of a float32 matrix. A group's scale is chosen when its turn comes."""
    O, I = w_OI.shape

    def one_group(b, carry):
        w_OI, q_OI, scale_OG = carry
        w_Og = jax.lax.dynamic_slice(w_OI, (0, b * group), (O, group))
        if u_II is None:
            scale_O = _best_scale(w_Og, jnp.ones(group))
            return w_OI, *_placed(b, _nearest(w_Og, scale_O[:, None]).astype(jnp.uint8), scale_O, q_OI, scale_OG)
        u_gI = jax.lax.dynamic_slice(u_II, (b * group, 0), (group, I))
        u_gg = jax.lax.dynamic_slice(u_gI, (0, b * group), (group, group))
        scale_O = _best_scale(w_Og, jnp.diagonal(u_gg) ** -2)

        def one_column(j, columns):
            w_Og, q_Og, error_Og = columns
            q_O = _nearest(w_Og[:, j], scale_O)
            error_O = (w_Og[:, j] - scale_O * (q_O - ZERO)) / u_gg[j, j]
            w_Og -= error_O[:, None] * u_gg[j]
            return w_Og, q_Og.at[:, j].set(q_O.astype(jnp.uint8)), error_Og.at[:, j].set(error_O)

        start = w_Og, jnp.zeros((O, group), jnp.uint8), jnp.zeros_like(w_Og)
        _, q_Og, error_Og = jax.lax.fori_loop(0, group, one_column, start)
        w_OI -= error_Og @ u_gI  # columns that are rounded already change too, and are not read again
        return w_OI, *_placed(b, q_Og, scale_O, q_OI, scale_OG)

    start = w_OI, jnp.zeros((O, I), jnp.uint8), jnp.zeros((O, I // group), jnp.float16)
    _, q_OI, scale_OG = jax.lax.fori_loop(0, I // group, one_group, start)
    return q_OI, scale_OG


def _placed(b, q_Og, scale_O, q_OI, scale_OG) -> tuple[jax.Array, jax.Array]:
    """(q_OI, scale_OG) with the columns and the scales of group b."""
    q_OI = jax.lax.dynamic_update_slice(q_OI, q_Og, (0, b * q_Og.shape[1]))
    return q_OI, scale_OG.at[:, b].set(scale_O.astype(jnp.float16))


def _nearest(w: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(w / scale) + ZERO, 0, LARGEST)


def _best_scale(w_Og: jax.Array, importance_g: jax.Array) -> jax.Array:
    """float32 [O], exact in float16: of a few scales the one with the least weighted sum of squared rounding errors."""
    whole_O = jnp.max(jnp.abs(w_Og), axis=-1) / (LARGEST / 2)

    def attempt(n, best):
        least_O, best_O = best
        scale_O = jnp.maximum((jnp.asarray(CLIPS)[n] * whole_O).astype(jnp.float16).astype(jnp.float32), TINY)
        off_Og = w_Og - scale_O[:, None] * (_nearest(w_Og, scale_O[:, None]) - ZERO)
        loss_O = jnp.sum(off_Og * off_Og * importance_g, axis=-1)
        return jnp.minimum(loss_O, least_O), jnp.where(loss_O < least_O, scale_O, best_O)

    start = jnp.full_like(whole_O, jnp.inf), jnp.full_like(whole_O, jnp.nan)
    return jax.lax.fori_loop(0, len(CLIPS), attempt, start)[1]


def meant(q_OI: np.ndarray, scale_OG: np.ndarray) -> np.ndarray:
    """The weights that the integers stand for, float32 [O, I]: to the bit what a reader makes of the packed tensors."""
    scale_OI = np.repeat(scale_OG.astype(np.float32), q_OI.shape[1] // scale_OG.shape[1], axis=1)
    return (q_OI.astype(np.float32) - np.float32(ZERO)) * scale_OI


@jax.jit
def output_error(off_OI: jax.Array, h_II: jax.Array) -> jax.Array:
    """Mean over the inputs of |(w' - w) x|^2, from the differences of the weights."""
    return jnp.sum((off_OI @ h_II) * off_OI)


def packed(q_OI: np.ndarray, scale_OG: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a GPTQ checkpoint, version 1: qweight packed along the inputs, qzeros along the outputs."""
    O, I = q_OI.shape
    q_KF = q_OI.T.astype(np.uint32).reshape(I // PER_WORD, PER_WORD, O)
    words = np.zeros((I // PER_WORD, O), np.uint32)
    for place in range(PER_WORD):
        words |= q_KF[:, place] << np.uint32(4 * place)
    groups = scale_OG.shape[1]
    return {
        "qweight": words.view(np.int32),
        "qzeros": np.full((groups, O // PER_WORD), V1_ZEROS, np.int32),
        "scales": np.ascontiguousarray(scale_OG.T),
        "g_idx": np.arange(I, dtype=np.int32) // np.int32(I // groups),
    }
