# SPDX-License-Identifier: Apache-2.0
"""GRPO: advantages of a group's answers against each other, and the clipped loss of their tokens.

    rewards [P, Q] -> advantages (host, float64) -> one per token [B, T] -> sum of losses / count of the whole step

(Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3; clip_high and "dapo": Yu et al. 2025, arXiv:2503.14476;
"dr_grpo": Liu et al. 2025, arXiv:2503.20783; ratio "sequence": Zheng et al. 2025, GSPO, arXiv:2507.18071.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.train.objectives.loss_sums import Ratios, counted, sequence_sums

# P prompts  Q answers to a prompt  B batch  T query  Z sequences of a row

AGGREGATIONS = ("grpo", "dr_grpo", "dapo")
KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO = 20.0  # log-ratios are cut here: exp stays finite, and ratios beyond give no gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How a policy learns from rewards; the defaults are GRPO with one reference-free update."""

    clip: float = 0.2  # ratios below 1 - clip give no gradient where the advantage is negative
    clip_high: float | None = None  # ratios above 1 + clip_high, where it is positive; None: like clip. DAPO: 0.28
    kl: float = 0.0  # coefficient of the KL from the reference, inside the loss; above 0 it needs a reference
    kl_estimator: str = "k3"
    aggregation: str = "grpo"  # what a token weighs, see policy_count
    max_completion: int | None = None  # tokens an answer may have: dr_grpo's divisor
    scale: str | None = None  # advantages over the rewards' "group" or "batch" deviation or "none"; None: see `scaling`
    eps: float = 1e-4  # added to that deviation
    ratio: str = "token"  # or "sequence": the geometric mean over an answer's tokens
    importance_cap: float | None = None  # bound of the weights policy / sampler (2.0 is usual); None: no correction

    def __post_init__(self):
        validate.number(self, "policy", ("clip", "kl", "eps"), float, 0.0)
        validate.number(self, "policy", ("clip_high",), float, 0.0, none=True)
        validate.number(self, "policy", ("importance_cap",), float, 1.0, none=True)
        validate.number(self, "policy", ("max_completion",), int, 1, none=True)
        validate.choice("policy.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        validate.choice("policy.aggregation", self.aggregation, AGGREGATIONS)
        validate.choice("policy.scale", self.scale, (None, "group", "batch", "none"))
        validate.choice("policy.ratio", self.ratio, ("token", "sequence"))
        if self.clip >= 1:
            raise UserError(f"policy.clip is {self.clip}; below 1, since ratios are never below 0. Usual: 0.2")
        if self.aggregation == "dr_grpo" and self.max_completion is None:
            raise UserError("policy.aggregation 'dr_grpo' divides by the longest answer: set policy.max_completion")

    @property
    def scaling(self) -> str:
        """The divisor of advantages: `scale`, by default nothing for dr_grpo and the group's deviation else."""
        return self.scale or ("none" if self.aggregation == "dr_grpo" else "group")


def advantages(rewards_PQ: np.ndarray, config: Policy) -> np.ndarray:
    """(reward - mean of its group) / (standard deviation + eps), float64 [P, Q], on the host.

    The deviation is the sample's (divided by n - 1), of the group or, with scale "batch", of all rewards given. An
    answer without a reward (NaN) is in no mean and has advantage 0, as do the answers of a group whose rewards are
    all equal. TRL, verl and Tunix agree on n - 1; eps is 1e-4 in TRL and 1e-6 in the others.

    Raises UserError for a reward that is infinite.
    """
    rewards_PQ = np.asarray(rewards_PQ, np.float64)
    if np.isinf(rewards_PQ).any():
        prompt, answer = np.argwhere(np.isinf(rewards_PQ))[0]
        raise UserError(
            f"the reward of answer {answer} to prompt {prompt} is {rewards_PQ[prompt, answer]}; rewards are finite, "
            "or NaN (None) for an answer without one"
        )
    given_PQ = ~np.isnan(rewards_PQ)
    n_P1 = given_PQ.sum(1, keepdims=True)
    mean_P1 = np.where(given_PQ, rewards_PQ, 0).sum(1, keepdims=True) / np.maximum(n_P1, 1)
    most_P1 = np.where(given_PQ, rewards_PQ, -np.inf).max(1, keepdims=True)
    # Equal rewards have advantage 0 exactly, and not what rounding their mean leaves, over eps.
    differ_P1 = (given_PQ & (rewards_PQ < most_P1)).any(1, keepdims=True)
    ahead_PQ = np.where(given_PQ & differ_P1, rewards_PQ - mean_P1, 0)
    if config.scaling == "none":
        return ahead_PQ
    if config.scaling == "batch":
        given = rewards_PQ[given_PQ]
        deviation = np.std(given, ddof=1) if given.size > 1 else 0.0
    else:
        deviation = np.sqrt((ahead_PQ**2).sum(1, keepdims=True) / np.maximum(n_P1 - 1, 1))
    return np.divide(ahead_PQ, deviation + config.eps, out=np.zeros_like(ahead_PQ), where=ahead_PQ != 0)


def policy_count(config: Policy, weights_BT: jax.Array, segments_BT: jax.Array, sequences: int) -> jax.Array:
    """The divisor of the sums of `policy_sums`, a scalar; counts of micro-batches add up to the step's.

    "grpo": the number of sequences, each being the mean of its tokens (the paper's 1/G sum 1/|o|; its G is Q here). A
    sequence without a counted token, such as a truncated one that is masked, adds nothing to the sum and still counts,
    as in TRL; verl and Tunix leave it out. "dapo": the number of counted tokens of the whole step, not of one device or
    micro-batch (TRL's "bnpo"). "dr_grpo": sequences times `max_completion`, so that a long answer's tokens weigh no
    less than a short one's.
    """
    if config.aggregation == "dapo":
        return jnp.sum(weights_BT)
    here_BZ = sequence_sums(jnp.ones_like(weights_BT), segments_BT, sequences) > 0
    number = jnp.sum(here_BZ, dtype=float)
    if config.aggregation == "grpo":
        return number
    assert config.max_completion is not None  # Policy has checked
    return number * config.max_completion


def policy_sums(
    config: Policy,
    logps_BT: jax.Array,
    old_BT: jax.Array | None,
    advantages_BT: jax.Array,
    weights_BT: jax.Array,
    segments_BT: jax.Array,
    sequences: int,
    reference_BT: jax.Array | None = None,
    sampled_BT: jax.Array | None = None,
) -> tuple[jax.Array, Ratios]:
    """(sum of the losses of a micro-batch's tokens, metrics); the sum is differentiable in `logps`.

        -w min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) + kl * KL(policy | reference),  rho = exp(logps - old)

    logps, old, reference, sampled: log-probabilities of the targets under the policy, the policy at the time of
    sampling, the reference, and as the sampler computed them. old None: the policy itself, for the only update on
    these samples; then rho is 1 and its gradient is not 0. advantages: one per sequence, on each of its tokens.
    weights: 1 for an answer's tokens, 0 elsewhere, where everything else may be anything.

    w = min(exp(old - sampled), importance_cap), without gradient, corrects for a sampler that is not the trainer (Yao
    et al. 2025; truncated importance sampling); 1 without a cap. KL, per token with d = logps - reference: "k1" d,
    "k2" d^2 / 2, "k3" exp(-d) + d - 1 (Schulman 2020). k1 is for monitoring only: inside a loss its expected
    gradient is 0.

    Metrics, each a mean over counted tokens: ratio; clip_ratio/low and clip_ratio/high, the shares where the clip took
    the gradient away; kl with a reference; with sampled log-probabilities sampling/importance (w, or uncut without a
    cap) and sampling/difference, |old - sampled|.

    Raises UserError if the configuration needs `reference` or `sampled` and it is not there.
    """
    if config.kl and reference_BT is None:
        raise UserError("policy.kl is above 0, which needs the log-probabilities of a reference; set policy.kl = 0")
    if config.importance_cap is not None and sampled_BT is None:
        raise UserError("policy.importance_cap needs the sampler's log-probabilities; leave it None for data without")
    counts = weights_BT > 0

    def log_ratio(upper_BT, lower_BT):
        return jnp.clip(jnp.where(counts, upper_BT - lower_BT, 0), -LOG_RATIO, LOG_RATIO)

    frozen_BT = jax.lax.stop_gradient(logps_BT)
    old_BT = frozen_BT if old_BT is None else old_BT
    advantages_BT = jnp.where(counts, advantages_BT, 0)
    log_rho_BT = log_ratio(logps_BT, old_BT)
    if config.ratio == "sequence":
        log_rho_BT = _sequence_means(log_rho_BT, weights_BT, segments_BT, sequences)
    rho_BT = jnp.exp(log_rho_BT)
    low, high = 1 - config.clip, 1 + (config.clip if config.clip_high is None else config.clip_high)
    losses_BT = -jnp.minimum(rho_BT * advantages_BT, jnp.clip(rho_BT, low, high) * advantages_BT)
    metrics = {
        "ratio": rho_BT,
        "clip_ratio/low": (rho_BT < low) & (advantages_BT < 0),
        "clip_ratio/high": (rho_BT > high) & (advantages_BT > 0),
    }
    if sampled_BT is not None:
        importance_BT = jax.lax.stop_gradient(jnp.exp(log_ratio(old_BT, sampled_BT)))
        if config.importance_cap is not None:
            importance_BT = jnp.minimum(importance_BT, config.importance_cap)
            losses_BT *= importance_BT
        metrics |= {"sampling/importance": importance_BT, "sampling/difference": jnp.abs(old_BT - sampled_BT)}
    if reference_BT is not None:
        d_BT = log_ratio(logps_BT, reference_BT)
        kl_BT = {"k1": d_BT, "k2": d_BT**2 / 2, "k3": jnp.expm1(-d_BT) + d_BT}[config.kl_estimator]
        if config.kl:
            losses_BT += config.kl * kl_BT
        metrics["kl"] = kl_BT
    ratios = {name: counted(jax.lax.stop_gradient(values), weights_BT) for name, values in metrics.items()}
    losses_BT = jnp.where(counts, losses_BT, 0) * weights_BT
    if config.aggregation != "grpo":
        return jnp.sum(losses_BT), ratios
    totals_BZ, tokens_BZ = (sequence_sums(x, segments_BT, sequences) for x in (losses_BT, weights_BT))
    return jnp.sum(totals_BZ / jnp.where(tokens_BZ > 0, tokens_BZ, 1)), ratios


def _sequence_means(x_BT, weights_BT, segments_BT, sequences: int):
    """At each token the weighted mean of x over its sequence, 0 outside of sequences."""
    totals_BZ, tokens_BZ = (sequence_sums(x, segments_BT, sequences) for x in (x_BT * weights_BT, weights_BT))
    means_BZ = totals_BZ / jnp.where(tokens_BZ > 0, tokens_BZ, 1)
    mine_BTZ = segments_BT[..., None] == jnp.arange(sequences)
    return jnp.sum(jnp.where(mine_BTZ, means_BZ[:, None], 0), axis=-1)
