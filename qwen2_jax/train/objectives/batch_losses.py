# SPDX-License-Identifier: Apache-2.0
"""The objectives of the stages: from the hidden states of packed rows to sums over them.

A row holds sequences, kept apart by their segments. A group of sequences (a pair, or ranked responses) lies in one row,
and the segment of a sequence is its group's number in the row times Q plus its rank, 0 for the best.
"""

from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.model.cross_entropy import cross_entropy, token_logprobs
from qwen2_jax.model.decoder import Qwen2
from qwen2_jax.train.objectives import dpo, grpo
from qwen2_jax.train.objectives.loss_sums import Ratio, Sums, sequence_sums

# B batch  T query  P groups of a row  Q sequences of a group  Z = P * Q sequences of a row


class Objective(Protocol):
    """A loss over a batch's rows. temperature: the divisor of the logits before the log-softmax."""

    temperature: float

    def counts(self, batch: Batch) -> Any:
        """The divisors of the sums over the step's whole batch, known before the forward pass."""
        ...

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch, counts: Any) -> Sums:
        """batch: some of the step's rows; counts: of all of them."""
        ...


class NextToken:
    """Cross-entropy of the next token, a mean over targets. z_loss: as in model/cross_entropy.py."""

    temperature = 1.0

    def __init__(self, z_loss: float = 0.0):
        self.z_loss = z_loss

    def counts(self, batch: Batch) -> jax.Array:
        return batch.weights_BT.sum()

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch, counts: jax.Array) -> Sums:
        head_VD = cast(jax.Array, model.head_weight())  # embedding and LM head are neither adapted nor int8 in training
        sums = cross_entropy(hidden_BTD, head_VD, batch.targets_BT, batch.weights_BT, z_loss=self.z_loss)
        loss = Ratio(sums.nll, sums.weight)
        return Sums(sums.loss / jnp.maximum(counts, 1e-9), loss, {"accuracy": Ratio(sums.correct, sums.weight)})


class Pairs:
    """DPO and its relatives (dpo.py) on pairs, chosen before rejected. Rows carry reference_BT.

    groups: the most pairs that a row may hold. temperature: that the answers were sampled with, if they were.
    """

    def __init__(self, config: dpo.Preference, groups: int, temperature: float = 1.0):
        self.config, self.groups, self.temperature = config, groups, temperature

    def counts(self, batch: Batch) -> dpo.PairCounts:
        return dpo.pair_counts(self._per_answer(batch.weights_BT, batch))

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch, counts: dpo.PairCounts) -> Sums:
        logps_BT = logprobs(model, hidden_BTD, batch, self.temperature)
        per_answer = [self._per_answer(x, batch) for x in (logps_BT, batch.reference_BT, batch.weights_BT)]
        sums = dpo.pair_sums(self.config, *per_answer)
        pairs = dpo.pair_counts(per_answer[-1]).pairs.astype(jnp.float32)
        return Sums(dpo.pair_objective(self.config, sums, counts), Ratio(sums.loss, pairs), sums.metrics)

    def _per_answer(self, x_BT: jax.Array, batch: Batch) -> jax.Array:
        return sequence_sums(x_BT, batch.segments_BT, 2 * self.groups).reshape(x_BT.shape[0], self.groups, 2)


class Ranked:
    """A reward model's Bradley-Terry loss over ranked responses, the best first (dpo.bradley_terry).

    groups, ranks: the most groups that a row may hold, and the most responses that a group has.
    """

    temperature = 1.0

    def __init__(self, groups: int, ranks: int, *, margin: float = 0.0, centring: float = 0.0):
        self.groups, self.ranks, self.margin, self.centring = groups, ranks, margin, centring

    def counts(self, batch: Batch) -> jax.Array:
        return dpo.ranking_groups(self._present(batch)).astype(jnp.float32)

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch, counts: jax.Array) -> Sums:
        # Picked before the head, which has work at one position of each sequence. A mesh may lay tokens out in another
        # order, so the last one is where the position is the sequence's length.
        sequences = jnp.arange(self.groups * self.ranks)
        lengths_BZ = sequence_sums(jnp.ones_like(batch.segments_BT), batch.segments_BT, len(sequences))
        last_BTZ = (batch.segments_BT[..., None] == sequences) & (
            batch.positions_BT[..., None] + 1 == lengths_BZ[:, None]
        )
        hidden_BZD = jnp.einsum("bts,btd->bsd", last_BTZ.astype(hidden_BTD.dtype), hidden_BTD, precision="highest")
        scores_BPQ = model.score(hidden_BZD).reshape(-1, self.groups, self.ranks)
        present_BPQ = self._present(batch)
        sums = dpo.bradley_terry(scores_BPQ, present_BPQ, self.margin, self.centring)
        groups = sums.groups.astype(jnp.float32)
        return Sums(sums.loss / jnp.maximum(counts, 1.0), Ratio(sums.loss, groups), sums.metrics)

    def _present(self, batch: Batch) -> jax.Array:
        ones_BT = jnp.ones(batch.segments_BT.shape, jnp.float32)
        tokens_BZ = sequence_sums(ones_BT, batch.segments_BT, self.groups * self.ranks)
        return tokens_BZ.reshape(-1, self.groups, self.ranks) > 0


class PolicyGradient:
    """GRPO's clipped loss of sampled answers (grpo.py). Rows carry advantages_BT, and what the settings need.

    sequences: the most answers that a row may hold. temperature: that the answers were sampled with.
    """

    def __init__(self, config: grpo.Policy, sequences: int, temperature: float):
        self.config, self.sequences, self.temperature = config, sequences, temperature

    def counts(self, batch: Batch) -> jax.Array:
        return grpo.policy_count(self.config, batch.weights_BT, batch.segments_BT, self.sequences)

    def sums(self, model: Qwen2, hidden_BTD: jax.Array, batch: Batch, counts: jax.Array) -> Sums:
        logps_BT = logprobs(model, hidden_BTD, batch, self.temperature)
        total, metrics = grpo.policy_sums(
            self.config,
            logps_BT,
            batch.old_BT,
            batch.advantages_BT,
            batch.weights_BT,
            batch.segments_BT,
            self.sequences,
            batch.reference_BT,
            batch.sampled_BT,
        )
        return Sums(total / jnp.maximum(counts, 1e-9), Ratio(total, self.counts(batch)), metrics)


def logprobs(model: Qwen2, hidden_BTD: jax.Array, batch: Batch, temperature: float = 1.0) -> jax.Array:
    """log p of each target in nats, float32 [B, T]; 0 where nothing is a target."""
    found_BT = token_logprobs(hidden_BTD, model.head_weight(), batch.targets_BT, temperature=temperature)
    return jnp.where(batch.weights_BT > 0, found_BT, 0.0)
