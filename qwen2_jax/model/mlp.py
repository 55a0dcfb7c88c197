# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers: the dense SwiGLU, and Qwen2-MoE's routed experts with a gated shared expert."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.weights.params import Declare
from qwen2_jax.weights.weight import matmul, of_experts

# B batch  T query  M = B * T rows  D model  F ffn  E experts  k experts per token


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, declare: Declare, *, width: int, hf: str):
        D, F = ("embed", config.hidden_size), ("mlp", width)
        self.gate_FD = declare(F, D, hf=f"{hf}.gate_proj.weight")
        self.up_FD = declare(F, D, hf=f"{hf}.up_proj.weight")
        self.down_DF = declare(D, F, hf=f"{hf}.down_proj.weight")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(matmul(x_BTD, self.gate_FD[...])) * matmul(x_BTD, self.up_FD[...])
        return matmul(hidden, self.down_DF[...])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over tokens without padding, float32: what the router's losses and its load are computed from. Layers add
    up.

    counts_E: how often each expert was chosen. probabilities_E: sum of softmax(router logits), carries the gradient.
    z: sum of squared log-sum-exps of the router logits. tokens: number of tokens times layers.
    """

    counts_E: jax.Array
    probabilities_E: jax.Array
    z: jax.Array
    tokens: jax.Array

    def __add__(self, other: "RouterStats") -> "RouterStats":
        return jax.tree.map(jnp.add, self, other)


class SparseMLP(nnx.Module):
    """y = sum over the k best experts of p_e * expert_e(x) + sigmoid(shared_gate x) * shared(x).

    p = softmax over all experts of the router logits, in float32. The k probabilities are renormalised to sum to 1 only
    if the config says norm_topk_prob (released Qwen2-MoE models do not). No capacity: no token is ever dropped.
    (Qwen2 report, arXiv:2407.10671, sec. 2.2.2.)
    """

    def __init__(self, config: ModelConfig, declare: Declare):
        D, E = ("embed", config.hidden_size), ("experts", config.num_experts)
        F = ("mlp", config.moe_intermediate_size)
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router_ED = declare(E, D, hf="mlp.gate.weight")
        expert = "mlp.experts.{e}"
        self.gate_EFD = declare(E, F, D, hf=f"{expert}.gate_proj.weight", hf_shape=(F[1], D[1]))
        self.up_EFD = declare(E, F, D, hf=f"{expert}.up_proj.weight", hf_shape=(F[1], D[1]))
        self.down_EDF = declare(E, D, F, hf=f"{expert}.down_proj.weight", hf_shape=(D[1], F[1]))
        self.shared_gate_D = declare(D, hf="mlp.shared_expert_gate.weight", hf_shape=(1, D[1]))
        self.shared = MLP(config, declare, width=config.shared_expert_intermediate_size, hf="mlp.shared_expert")

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, implementation: str | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """real_BT: bool, False for padding, which is sent to no routed expert and is not in the statistics.

        implementation: see ops.
        """
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_ME, p_ME, p_Mk, expert_Mk = route(x_MD, self.router_ED[...], self.top_k)
        weight_Mk = p_Mk / p_Mk.sum(axis=-1, keepdims=True) if self.renormalise else p_Mk

        E, real_M = p_ME.shape[-1], real_BT.reshape(-1)
        in_rows = lambda x_Mk: x_Mk.reshape(*real_BT.shape, -1)  # noqa: E731
        routed_BTD = ops.experts(
            x_BTD,
            in_rows(jnp.where(real_M[:, None], expert_Mk, E)),  # padding goes to no expert
            in_rows(weight_Mk),
            of_experts(self.gate_EFD[...]),
            of_experts(self.up_EFD[...]),
            of_experts(self.down_EDF[...]),
            implementation=implementation,
        )
        gate_BT = jax.nn.sigmoid(jnp.sum(x_BTD * self.shared_gate_D[...], axis=-1))
        y_BTD = routed_BTD + gate_BT[..., None] * self.shared(x_BTD)
        return y_BTD, _stats(logits_ME, p_ME, expert_Mk, real_M)


def route(x_MD: jax.Array, router_ED: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(float32 logits [M, E], their softmax [M, E], the k largest probabilities [M, k], their experts [M, k])."""
    # HIGHEST: by default TPUs and recent GPUs round the inputs of a float32 product to 8 or 10 bits.
    logits_ME = jax.lax.dot_general(
        x_MD.astype(jnp.float32),
        router_ED.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    p_ME = jax.nn.softmax(logits_ME, axis=-1)
    return logits_ME, p_ME, *jax.lax.top_k(p_ME, top_k)


def _stats(logits_ME, p_ME, expert_Mk, real_M) -> RouterStats:
    real_M1 = real_M.astype(jnp.float32)[:, None]
    chosen_ME = jax.nn.one_hot(expert_Mk, p_ME.shape[-1], dtype=jnp.float32).sum(axis=1)
    z_M = jax.nn.logsumexp(logits_ME, axis=-1) ** 2
    return RouterStats(
        counts_E=jax.lax.stop_gradient((chosen_ME * real_M1).sum(axis=0)),
        probabilities_E=(p_ME * real_M1).sum(axis=0),
        z=(z_M * real_M1[:, 0]).sum(),
        tokens=real_M1.sum(),
    )


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """E * sum_e f_e P_e, float32 scalar; equals the number of experts per token when the load is even.

    f_e: how often expert e is chosen per token, P_e: its mean probability, both pooled over layers and tokens
    (Fedus et al. 2021, arXiv:2101.03961, eq. 4, without the division by k, as transformers defines it for Qwen2-MoE).
    Deviation: probabilities are softmax(logits) in float32. Some releases of transformers apply softmax a second time.
    """
    tokens = jnp.maximum(stats.tokens, 1.0)
    return stats.counts_E.shape[-1] * jnp.sum(stats.counts_E / tokens * (stats.probabilities_E / tokens))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean squared log-sum-exp of the router logits (Zoph et al. 2022, arXiv:2202.08906, eq. 5), float32 scalar."""
    return stats.z / jnp.maximum(stats.tokens, 1.0)
