# SPDX-License-Identifier: Apache-2.0
"""GRPO's advantages and losses against worked numbers and a loop over sequences in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.train.objectives.grpo import Policy, advantages, policy_count, policy_sums

LENGTHS = (5, 3, 4, 2, 1, 4, 3, 1)  # of 8 sequences, the first 2 tokens of each of the long ones being the prompt's
FIELDS = ("logps", "old", "advantages", "weights", "reference", "sampled")
PACKINGS = {
    "one row": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two rows": [[3, 1, 5, 0], [7, 6, 2, 4]],
    "one row each": [[i] for i in range(8)],
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sequences():
    """8 answers, one of which (the last) has no counted token; ratios on both sides of both clips."""
    generator = np.random.default_rng(11)
    made = []
    for number, length in enumerate(LENGTHS):
        old = -generator.exponential(2, length)
        made.append(
            {
                "logps": old + generator.normal(0, 0.5, length),
                "old": old,
                "advantages": np.full(length, generator.normal()),
                "weights": (np.arange(length) >= (2 if length > 2 else 0)).astype(float) * (number < 7),
                "reference": old + generator.normal(0, 0.3, length),
                "sampled": old + generator.normal(0, 0.5, length),
            }
        )
    return made


def pack(made, rows, length=25):
    """Rows of sequences as arrays [B, T] with nothing usable where the weight is 0, and segments."""
    arrays = {name: np.full((len(rows), length), np.nan) for name in FIELDS}
    arrays["weights"][:] = 0
    segments = np.full((len(rows), length), -1)
    for row, members in enumerate(rows):
        at = 1  # padding may also come first
        for number, member in enumerate(members):
            here = np.s_[row, at : at + LENGTHS[member]]
            for name in FIELDS:
                arrays[name][here] = made[member][name]
            segments[here] = number
            at += LENGTHS[member]
    for name in set(FIELDS) - {"weights"}:
        arrays[name][arrays["weights"] == 0] = np.nan
    return arrays, segments


def run(config, arrays, segments, logps=None):
    logps = arrays["logps"] if logps is None else logps
    return policy_sums(
        config, jnp.asarray(logps), arrays["old"], arrays["advantages"], arrays["weights"], segments, 8,
        reference_BT=arrays["reference"], sampled_BT=arrays["sampled"],
    )  # fmt: skip


def by_hand(config, made):
    """The loss of all sequences: the formulas in Python, token by token."""
    high = config.clip if config.clip_high is None else config.clip_high
    per_sequence, tokens = [], 0
    for s in made:
        at = [t for t, w in enumerate(s["weights"]) if w]
        tokens += len(at)
        mean = sum(s["logps"][t] - s["old"][t] for t in at) / max(len(at), 1)
        losses = []
        for t in at:
            rho = math.exp(mean if config.ratio == "sequence" else s["logps"][t] - s["old"][t])
            a = s["advantages"][t]
            loss = -min(rho * a, min(max(rho, 1 - config.clip), 1 + high) * a)
            if config.importance_cap is not None:
                loss *= min(math.exp(s["old"][t] - s["sampled"][t]), config.importance_cap)
            x = s["reference"][t] - s["logps"][t]
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[config.kl_estimator]
            losses.append(loss + config.kl * kl)
        per_sequence.append(losses)
    if config.aggregation == "grpo":
        return sum(sum(x) / max(len(x), 1) for x in per_sequence) / len(made)
    total = sum(map(sum, per_sequence))
    return total / (tokens if config.aggregation == "dapo" else len(made) * config.max_completion)


CONFIGS = {
    "grpo": Policy(kl=0.04),
    "dapo": Policy(aggregation="dapo", clip_high=0.28, importance_cap=1.3),
    "dr_grpo": Policy(aggregation="dr_grpo", max_completion=8, kl=0.1, kl_estimator="k2"),
    "gspo": Policy(ratio="sequence", clip=0.05, clip_high=0.1, kl=0.1, kl_estimator="k1"),
    "gspo dapo": Policy(ratio="sequence", clip=0.05, aggregation="dapo", importance_cap=2.0),
}


@pytest.mark.parametrize("rows", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_are_those_of_the_sequences_however_they_are_packed(config, rows):
    arrays, segments = pack(sequences(), rows)
    total, metrics = run(config, arrays, segments)
    count = policy_count(config, jnp.asarray(arrays["weights"]), segments, 8)
    assert float(total / count) == pytest.approx(by_hand(config, sequences()), rel=0, abs=1e-12)
    assert all(np.isfinite(x) for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_the_finite_differences(config):
    arrays, segments = pack(sequences(), PACKINGS["two rows"])
    loss = jax.jit(lambda x: run(config, arrays, segments, x)[0])
    got = jax.grad(loss)(arrays["logps"])
    counts = arrays["weights"] > 0
    assert not np.asarray(got)[~counts].any()
    for index in np.argwhere(counts):
        nudge = np.zeros(counts.shape)
        nudge[tuple(index)] = 1e-6
        difference = (loss(arrays["logps"] + nudge) - loss(arrays["logps"] - nudge)) / 2e-6
        assert float(got[tuple(index)]) == pytest.approx(float(difference), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_micro_batches_add_up(config):
    arrays, segments = pack(sequences(), PACKINGS["one row each"])
    total, metrics = run(config, arrays, segments)
    count = policy_count(config, jnp.asarray(arrays["weights"]), segments, 8)
    parts = [({k: v[at] for k, v in arrays.items()}, segments[at]) for at in (np.s_[:3], np.s_[3:])]
    sums = [run(config, *part) for part in parts]
    counts = [policy_count(config, jnp.asarray(part["weights"]), here, 8) for part, here in parts]
    assert float(sum(counts)) == float(count)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((count, total, metrics)))
    assert float(sum(part for part, _ in sums)) == pytest.approx(float(total), rel=1e-12)
    both = jax.tree.map(jnp.add, *(part for _, part in sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), both, metrics)


def test_metrics_are_means_over_counted_tokens():
    config, made = CONFIGS["dapo"], sequences()
    arrays, segments = pack(made, PACKINGS["one row"])
    joined = {name: np.concatenate([s[name][s["weights"] > 0] for s in made]) for name in FIELDS}
    rho = np.exp(joined["logps"] - joined["old"])
    x = joined["reference"] - joined["logps"]
    expected = {
        "ratio": rho.mean(),
        "clip_ratio/low": np.mean((rho < 0.8) & (joined["advantages"] < 0)),
        "clip_ratio/high": np.mean((rho > 1.28) & (joined["advantages"] > 0)),
        "kl": np.mean(np.exp(x) - x - 1),
        "sampling/importance": np.minimum(np.exp(joined["old"] - joined["sampled"]), 1.3).mean(),
        "sampling/difference": np.abs(joined["old"] - joined["sampled"]).mean(),
    }
    assert expected["clip_ratio/low"] > 0 and expected["clip_ratio/high"] > 0
    got = {name: float(ratio.mean()) for name, ratio in run(config, arrays, segments)[1].items()}
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_clip_takes_the_gradient_away_on_its_side_only():
    """Ratios 0.7, 1 and 1.4 with both signs of the advantage."""
    logps = np.log([[0.7, 1.0, 1.4] * 2])
    a = np.array([[1.0] * 3 + [-1.0] * 3])
    ones, zeros = np.ones((1, 6)), np.zeros((1, 6), int)
    loss = lambda x: policy_sums(Policy(aggregation="dapo"), x, 0 * logps, a, ones, zeros, 1)[0]
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logps)), [[-0.7, -1, 0, 0, 1, 1.4]], rtol=0, atol=1e-12)


def test_without_old_log_probabilities_the_ratio_is_1_and_the_gradient_is_not_0():
    arrays, segments = pack(sequences(), PACKINGS["two rows"])
    args = arrays["advantages"], arrays["weights"], segments, 8
    loss = lambda x: policy_sums(Policy(aggregation="dapo"), x, None, *args)[0]
    got = np.asarray(jax.grad(loss)(jnp.asarray(arrays["logps"])))
    counts = arrays["weights"] > 0
    np.testing.assert_allclose(got[counts], -arrays["advantages"][counts], rtol=0, atol=1e-15)
    assert float(loss(arrays["logps"])) == pytest.approx(-arrays["advantages"][counts].sum(), rel=1e-12)


def test_a_far_log_ratio_stays_finite():
    far = jnp.asarray([[-800.0, 800.0]])
    zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2))
    loss = lambda x: policy_sums(Policy(kl=1.0), x, zeros, ones, ones, jnp.zeros((1, 2), int), 1, reference_BT=zeros)[0]
    value, gradient = jax.value_and_grad(loss)(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_reductions_weigh_tokens_differently():
    """An answer of 1 token with loss -1 and one of 3 with losses 1: per sequence, per token, per possible token."""
    zeros, ones = jnp.zeros((1, 4)), jnp.ones((1, 4))
    a, segments = jnp.asarray([[1.0, -1.0, -1.0, -1.0]]), jnp.asarray([[0, 1, 1, 1]])
    for aggregation, expected in (("grpo", 0.0), ("dapo", 0.5), ("dr_grpo", 2 / 16)):
        config = Policy(aggregation=aggregation, max_completion=8)
        total, _ = policy_sums(config, zeros, zeros, a, ones, segments, 2)
        assert float(total / policy_count(config, ones, segments, 2)) == expected


def test_advantages_worked_numbers():
    rewards = np.array([[1.0, 0.0, 1.0, 0.0], [0.1, 0.4, 0.7, 0.8]])
    got = advantages(rewards, Policy())
    np.testing.assert_allclose(got[0], np.array([1, -1, 1, -1]) * 0.8658754298, rtol=0, atol=5e-11)
    assert got[1, 3] == pytest.approx(0.9483833929, abs=5e-11)
    mean, deviation = 0.5, math.sqrt((0.16 + 0.01 + 0.04 + 0.09) / 3)
    np.testing.assert_allclose(got[1], (rewards[1] - mean) / (deviation + 1e-4), rtol=1e-12)


def test_advantages_by_scale():
    rewards = np.array([[1.0, 0.0], [4.0, 8.0]])
    deviation = math.sqrt(sum((x - 3.25) ** 2 for x in (1, 0, 4, 8)) / 3)
    np.testing.assert_allclose(
        advantages(rewards, Policy(scale="batch", eps=0.0)), np.array([[0.5, -0.5], [-2, 2]]) / deviation, rtol=1e-12
    )
    for config in (Policy(scale="none"), Policy(aggregation="dr_grpo", max_completion=9)):
        np.testing.assert_array_equal(advantages(rewards, config), [[0.5, -0.5], [-2, 2]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_answers_without_a_reward_and_groups_without_a_difference_have_advantage_0(scale, eps):
    nan = math.nan
    rewards = np.array([[0.1, 0.1, 0.1, 0.1], [1.0, nan, 3.0, nan], [nan, 2.0, nan, nan], [nan] * 4])
    got = advantages(rewards, Policy(scale=scale, eps=eps))
    assert got.dtype == np.float64
    assert not got[[0, 2, 3]].any() and not got[1, [1, 3]].any()
    assert got[1, 0] == -got[1, 2] < 0
    if scale == "group":
        assert got[1, 2] == pytest.approx(1 / (math.sqrt(2) + eps), rel=1e-12)
    assert not advantages(rewards[2:], Policy(scale=scale, eps=eps)).any()


def test_an_infinite_reward_is_named():
    with pytest.raises(UserError, match="answer 1 to prompt 0 is inf"):
        advantages([[1.0, math.inf]], Policy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, "below 1"),
        ({"kl": -0.1}, "kl is -0.1"),
        ({"kl_estimator": "k4"}, "'k3'"),
        ({"aggregation": "bnpo"}, "'dapo'"),
        ({"aggregation": "dr_grpo"}, "set policy.max_completion"),
        ({"scale": "std"}, "'batch'"),
        ({"ratio": "word"}, "'sequence'"),
        ({"importance_cap": 0.5}, "1.0 or more"),
        ({"max_completion": 0}, "max_completion is 0"),
    ],
)
def test_what_a_config_refuses(options, message):
    with pytest.raises(UserError, match=message):
        Policy(**options)


@pytest.mark.parametrize("config", [Policy(kl=0.1), Policy(importance_cap=2.0)], ids=["kl", "importance"])
def test_a_loss_that_lacks_log_probabilities_says_which(config):
    x = jnp.zeros((1, 2))
    with pytest.raises(UserError, match="needs the"):
        policy_sums(config, x, x, x, x, jnp.zeros((1, 2), int), 1)
