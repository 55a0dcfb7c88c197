# SPDX-License-Identifier: Apache-2.0
"""Preference losses: pairs of answers for a policy (DPO, IPO, SLiC), ranked answers for a reward model.

    per token [B, T] -> sequence_sums -> per answer [B, P, Q] -> loss per pair -> sums over pairs

Sums add up over micro-batches and are divided by counts of the whole step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.train.objectives.loss_sums import Ratios, counted

# B batch  P groups of a row, each of the answers to one prompt  Q answers of a group, the best first; of a pair: 0
# chosen, 1 rejected

LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """How a policy learns from pairs; the default is DPO as published (Rafailov et al. 2023, arXiv:2305.18290).

    loss: of h, the log-ratio of the chosen answer minus that of the rejected one, each the sum over its tokens of
    log policy - log reference. "sigmoid": -log sigmoid(beta h). "hinge": max(0, 1 - beta h) (SLiC). "sigmoid_norm"
    and "ipo" divide each log-ratio by its number of tokens first; "ipo" is (h - 1 / (2 beta))^2 (Azar et al. 2023,
    arXiv:2310.12036; lengths as its authors confirmed to TRL).
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0  # e: the share of pairs that are thought to be the wrong way round
    robust: bool = False  # corrects for e without bias (Chowdhury et al. 2024, arXiv:2403.00409) instead of cDPO
    sft: float = 0.0  # coefficient of the chosen answers' mean cross-entropy per token

    def __post_init__(self):
        validate.choice("preference.loss", self.loss, LOSSES)
        validate.number(self, "preference", ("beta", "label_smoothing", "sft"), float, 0.0)
        validate.number(self, "preference", ("robust",), bool)
        if not self.beta:
            raise UserError("preference.beta is 0, which is no preference at all; usual: 0.01 to 0.5")
        if not self.label_smoothing < 0.5:
            raise UserError(
                f"preference.label_smoothing is {self.label_smoothing}; below 0.5, or more pairs are wrong than right"
            )
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid_norm"):
            raise UserError(
                f"preference.label_smoothing is for the losses sigmoid and sigmoid_norm; {self.loss!r} takes none"
            )
        if self.robust and not self.label_smoothing:
            raise UserError(
                "preference.robust needs the share of wrong pairs: set preference.label_smoothing between 0 and 0.5"
            )


class PairSums(NamedTuple):
    """Sums over the pairs of a micro-batch, scalars. `loss` and `nll` are differentiable."""

    loss: jax.Array  # over pairs
    nll: jax.Array  # over the chosen answers' tokens, nats
    metrics: Ratios


class PairCounts(NamedTuple):
    """The divisors of the sums, scalars: counts of the whole step, known from its batch."""

    pairs: jax.Array
    tokens: jax.Array  # of the chosen answers


def pair_losses(
    config: Preference,
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    chosen_tokens: jax.Array | float = 1.0,
    rejected_tokens: jax.Array | float = 1.0,
) -> jax.Array:
    """The loss of each pair, in the shape of the arguments, without the SFT term.

    The first four: sums of log-probabilities over an answer's tokens, under the policy and under the reference. The
    last two: numbers of those tokens, read by "sigmoid_norm" and "ipo" alone.

    label_smoothing e makes cDPO, (1 - e) l(h) + e l(-h), or, with robust, ((1 - e) l(h) - e l(-h)) / (1 - 2e).
    Deviation: TRL from 0.29 on ignores e for "sigmoid"; here, as in earlier TRL and in Tunix, "sigmoid" reads it.
    """
    chosen, rejected = chosen_logps - ref_chosen, rejected_logps - ref_rejected
    if config.loss in ("sigmoid_norm", "ipo"):
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
    h, e = chosen - rejected, config.label_smoothing
    if config.loss == "ipo":
        return (h - 1 / (2 * config.beta)) ** 2
    if config.loss == "hinge":
        return jax.nn.relu(1 - config.beta * h)
    right, wrong = jax.nn.softplus(-config.beta * h), jax.nn.softplus(config.beta * h)  # -log sigmoid(+-beta h)
    if config.robust:
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    return (1 - e) * right + e * wrong


def pair_counts(tokens_BP2: jax.Array) -> PairCounts:
    """Pairs, and tokens of their chosen answers. tokens: per answer, those that count; 0 for answers that are absent.

    A pair counts if both of its answers do.
    """
    pairs_BP = (tokens_BP2 > 0).all(-1)
    return PairCounts(jnp.sum(pairs_BP, dtype=float), jnp.sum(jnp.where(pairs_BP, tokens_BP2[..., 0], 0), dtype=float))


def pair_sums(config: Preference, logps_BP2: jax.Array, reference_BP2: jax.Array, tokens_BP2: jax.Array) -> PairSums:
    """Losses and metrics of the pairs in a micro-batch.

    logps, reference: log-probabilities summed over an answer's tokens, under the policy and the reference.
    tokens: number of those; pairs with an answer of 0 tokens are left out, whatever their other values.

    Metrics, each a mean over pairs: rewards/chosen and rewards/rejected (beta times the log-ratio, not divided by
    lengths), rewards/margins, rewards/accuracies (the chosen reward is strictly larger, so 0 before the first step),
    logps/chosen, logps/rejected.
    """
    pairs_BP = (tokens_BP2 > 0).all(-1)
    present = pairs_BP[..., None]
    # Values of absent pairs are replaced before the loss, not masked after it: their gradient may not be finite.
    logps_BP2, reference_BP2 = (jnp.where(present, x, 0) for x in (logps_BP2, reference_BP2))
    tokens_BP2 = jnp.where(present, tokens_BP2, 1)
    both = [x[..., rank] for x in (logps_BP2, reference_BP2, tokens_BP2) for rank in (0, 1)]
    losses_BP = pair_losses(config, *both)
    rewards_BP2 = jax.lax.stop_gradient(config.beta * (logps_BP2 - reference_BP2))
    margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
    metrics = {
        "rewards/chosen": rewards_BP2[..., 0],
        "rewards/rejected": rewards_BP2[..., 1],
        "rewards/accuracies": margins_BP > 0,
        "rewards/margins": margins_BP,
        "logps/chosen": jax.lax.stop_gradient(logps_BP2[..., 0]),
        "logps/rejected": jax.lax.stop_gradient(logps_BP2[..., 1]),
    }
    return PairSums(
        loss=jnp.sum(jnp.where(pairs_BP, losses_BP, 0)),
        nll=-jnp.sum(logps_BP2[..., 0]),
        metrics={name: counted(values, pairs_BP) for name, values in metrics.items()},
    )


def pair_objective(config: Preference, sums: PairSums, counts: PairCounts) -> jax.Array:
    """A micro-batch's part of the objective: loss per pair plus `sft` times the chosen answers' nll per token.

    counts: of the whole step. Two conventions exist for the SFT term: the mean over the step's chosen tokens (TRL's
    "sft" loss), taken here because it does not depend on how the step is cut, and the mean over answers of each
    answer's mean (LLaMA-Factory's pref_ftx), which favours short answers.
    """
    value = sums.loss / jnp.maximum(counts.pairs, 1)
    return value + config.sft * sums.nll / jnp.maximum(counts.tokens, 1) if config.sft else value


class RankingSums(NamedTuple):
    """Sums over the groups of a micro-batch, scalars. `loss` is differentiable."""

    loss: jax.Array  # over groups, of the mean over their pairs
    groups: jax.Array  # groups with a pair
    metrics: Ratios


def bradley_terry(
    scores_BPQ: jax.Array,
    present_BPQ: jax.Array,
    margin: jax.Array | float = 0.0,
    centring: float = 0.0,
    ranks_BPQ: jax.Array | None = None,
) -> RankingSums:
    """A reward model's loss over all pairs of ranked answers, the better one first in each pair (i, j):

        mean over a group's pairs of -log sigmoid(r_i - r_j - margin) + centring * (r_i + r_j)^2

    (Bradley and Terry 1952; all pairs of a prompt in one mean: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; Qwen2.5-
    Math, arXiv:2409.12122, eq. 1; centring: Eisenstein et al. 2023, arXiv:2312.09244.) Divided by the number of
    groups, every prompt weighs the same, however many answers it has; TRL knows pairs only.

    present: bool; absent answers may have any score, and a group with fewer than two answers counts for nothing.
    margin: a number, or an array that broadcasts to [B, P, Q, Q], read where i is better than j.
    ranks: smaller is better, and equals are not compared (Qwen2.5-Math: correct answers before wrong ones); by
    default each answer is better than those after it.

    Metrics: accuracy (share of the pairs with r_i > r_j) and margin (their mean r_i - r_j) over pairs; min_reward,
    mean_reward and max_reward, of each group, averaged over groups.
    """
    if ranks_BPQ is None:
        ranks_BPQ = jnp.broadcast_to(jnp.arange(scores_BPQ.shape[-1]), scores_BPQ.shape)
    scores_BPQ = jnp.where(present_BPQ, scores_BPQ, 0)
    better_BPQQ = ranks_BPQ[..., :, None] < ranks_BPQ[..., None, :]
    pairs_BPQQ = better_BPQQ & present_BPQ[..., :, None] & present_BPQ[..., None, :]
    ahead_BPQQ = scores_BPQ[..., :, None] - scores_BPQ[..., None, :]
    losses_BPQQ = jax.nn.softplus(margin - ahead_BPQQ)  # -log sigmoid
    if centring:
        losses_BPQQ += centring * (scores_BPQ[..., :, None] + scores_BPQ[..., None, :]) ** 2
    n_BP = pairs_BPQQ.sum((-2, -1))
    means_BP = jnp.where(pairs_BPQQ, losses_BPQQ, 0).sum((-2, -1)) / jnp.maximum(n_BP, 1)

    groups_BP = n_BP > 0
    scores_BPQ, ahead_BPQQ = jax.lax.stop_gradient((scores_BPQ, ahead_BPQQ))
    metrics = {
        "accuracy": counted(ahead_BPQQ > 0, pairs_BPQQ),
        "margin": counted(ahead_BPQQ, pairs_BPQQ),
        "min_reward": counted(jnp.where(present_BPQ, scores_BPQ, jnp.inf).min(-1), groups_BP),
        "mean_reward": counted(scores_BPQ.sum(-1) / jnp.maximum(present_BPQ.sum(-1), 1), groups_BP),
        "max_reward": counted(jnp.where(present_BPQ, scores_BPQ, -jnp.inf).max(-1), groups_BP),
    }
    return RankingSums(jnp.sum(means_BP), jnp.sum(groups_BP, dtype=float), metrics)


def ranking_groups(present_BPQ: jax.Array, ranks_BPQ: jax.Array | None = None) -> jax.Array:
    """Number of groups that `bradley_terry` counts, known before any score is."""
    return bradley_terry(jnp.zeros(present_BPQ.shape), present_BPQ, ranks_BPQ=ranks_BPQ).groups
