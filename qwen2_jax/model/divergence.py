# SPDX-License-Identifier: Apache-2.0
"""How far the next-token distributions of two models are apart: Kullback-Leibler divergence, top-1, perplexity.

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
    zero by float32's rounding, also below. same_M: bool [M], whether both have the same most probable token. loss_2M:
    float32 [2, M], -log p and -log q of the text's next token; NaN where it has none.
    """

    kl_M: np.ndarray
    same_M: np.ndarray
    loss_2M: np.ndarray

    def summary(self) -> dict[str, float]:
        """mean_kl, median_kl and p99_kl (99% of the positions are below), in nats; top1, the share of same tokens;
        perplexity_a, perplexity_b, of p and q on the text, and perplexity_ratio, b to a; positions, their number."""
        losses = np.nanmean(self.loss_2M, axis=1, dtype=np.float64)
        return {
            "mean_kl": float(self.kl_M.mean(dtype=np.float64)),
            "median_kl": float(np.median(self.kl_M)),
            "p99_kl": float(np.quantile(self.kl_M, 0.99)),
            "top1": float(self.same_M.mean()),
            "perplexity_a": float(np.exp(losses[0])),
            "perplexity_b": float(np.exp(losses[1])),
            "perplexity_ratio": float(np.exp(losses[1] - losses[0])),
            "positions": int(self.kl_M.size),
        }


def divergence(
    p_NTD: np.ndarray, p_head_VD: Weight, q_NTD: np.ndarray, q_head_VD: Weight, tokens_NT: np.ndarray
) -> Divergence:
    """Of the models p and q, from their hidden states after the final norm on the texts `tokens_NT`, and their heads.

    The vocabularies must have equal sizes. p is the model that q is measured against.
    """
    p_MD, q_MD = p_NTD.reshape(-1, p_NTD.shape[-1]), q_NTD.reshape(-1, q_NTD.shape[-1])
    next_M = np.pad(tokens_NT[:, 1:], ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    kl_M, same_M = np.empty(len(p_MD), np.float32), np.empty(len(p_MD), bool)
    loss_2M = np.empty((2, len(p_MD)), np.float32)
    for start in range(0, len(p_MD), CHUNK):
        rows = slice(start, min(start + CHUNK, len(p_MD)))
        p_cD, q_cD, next_c = (_filled(x[rows]) for x in (p_MD, q_MD, next_M))
        found = jax.device_get(_of_chunk(p_cD, p_head_VD, q_cD, q_head_VD, next_c))
        kl_M[rows], same_M[rows], loss_2M[:, rows] = (x[..., : rows.stop - start] for x in found)
    return Divergence(kl_M, same_M, np.where(next_M < 0, np.nan, loss_2M))


def _filled(x_c: np.ndarray) -> np.ndarray:
    """CHUNK rows, so that one program serves the last chunk too."""
    return np.pad(x_c, [(0, CHUNK - len(x_c)), *[(0, 0)] * (x_c.ndim - 1)])


@jax.jit
def _of_chunk(p_cD, p_head_VD: Weight, q_cD, q_head_VD: Weight, next_c) -> tuple[jax.Array, ...]:
    p_cV, q_cV = (matmul(x, head, dtype=jnp.float32) for x, head in ((p_cD, p_head_VD), (q_cD, q_head_VD)))
    log_p_cV, log_q_cV = jax.nn.log_softmax(p_cV), jax.nn.log_softmax(q_cV)
    kl_c = jnp.sum(jnp.exp(log_p_cV) * (log_p_cV - log_q_cV), axis=-1)
    loss_2c = jnp.stack([-jnp.take_along_axis(x, next_c[:, None], axis=1)[:, 0] for x in (log_p_cV, log_q_cV)])
    return kl_c, p_cV.argmax(-1) == q_cV.argmax(-1), loss_2c
