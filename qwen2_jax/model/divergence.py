# SPDX-License-Identifier: Apache-2.0
"""How far the next-token distributions of two models are apart: Kullback-Leibler divergence and top-1 agreement.

Logits exist for a few rows at a time, in float32: a vocabulary of 151,936 takes 0.6 MB for each position and model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.weights.weight import Weight, matmul

# M positions  c positions of a chunk  D model width  V vocabulary

CHUNK = 128  # positions at a time: two arrays of logits of 78 MB each for a vocabulary of 151,936


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Of two models p and q at M positions of a text.

    kl_M: float32 [M], the sum over tokens v of p(v) * log(p(v) / q(v)) in nats; at equal distributions it may be off
    zero by float32's rounding, also below. same_M: bool [M], whether both have the same most probable token.
    """

    kl_M: np.ndarray
    same_M: np.ndarray

    def summary(self) -> dict[str, float]:
        """mean_kl, median_kl and p99_kl (99% of the positions are below), in nats; top1, the share of same tokens;
        positions, their number."""
        return {
            "mean_kl": float(self.kl_M.mean(dtype=np.float64)),
            "median_kl": float(np.median(self.kl_M)),
            "p99_kl": float(np.quantile(self.kl_M, 0.99)),
            "top1": float(self.same_M.mean()),
            "positions": int(self.kl_M.size),
        }


def divergence(p_MD: np.ndarray, p_head_VD: Weight, q_MD: np.ndarray, q_head_VD: Weight) -> Divergence:
    """Of the models p and q, from their hidden states after the final norm, [..., D] each, and their output heads.

    The vocabularies must have equal sizes. p is the model that q is measured against.
    """
    p_MD, q_MD = p_MD.reshape(-1, p_MD.shape[-1]), q_MD.reshape(-1, q_MD.shape[-1])
    kl_M, same_M = np.empty(len(p_MD), np.float32), np.empty(len(p_MD), bool)
    for start in range(0, len(p_MD), CHUNK):
        rows = slice(start, min(start + CHUNK, len(p_MD)))
        kl_c, same_c = _of_chunk(_filled(p_MD[rows]), p_head_VD, _filled(q_MD[rows]), q_head_VD)
        kl_M[rows] = np.asarray(kl_c)[: rows.stop - start]
        same_M[rows] = np.asarray(same_c)[: rows.stop - start]
    return Divergence(kl_M, same_M)


def _filled(x_cD: np.ndarray) -> np.ndarray:
    """CHUNK rows, so that one program serves the last chunk too."""
    return np.pad(x_cD, ((0, CHUNK - len(x_cD)), (0, 0)))


@jax.jit
def _of_chunk(p_cD, p_head_VD: Weight, q_cD, q_head_VD: Weight) -> tuple[jax.Array, jax.Array]:
    p_cV, q_cV = (matmul(x, head, dtype=jnp.float32) for x, head in ((p_cD, p_head_VD), (q_cD, q_head_VD)))
    log_p_cV, log_q_cV = jax.nn.log_softmax(p_cV), jax.nn.log_softmax(q_cV)
    return jnp.sum(jnp.exp(log_p_cV) * (log_p_cV - log_q_cV), axis=-1), p_cV.argmax(-1) == q_cV.argmax(-1)
