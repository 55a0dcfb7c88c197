# SPDX-License-Identifier: Apache-2.0
"""Rollouts: a completion is that of its prompt alone, its log-probabilities are the trainer's, no weight is copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from few import slow
from qwen2_jax import model
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.rollouts import Rollouts
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.model import cross_entropy
from tiny import random_params
from tolerance import close

from .conftest import TINY
from .test_generate import SPARSE

CONFIGS = {"dense": ModelConfig(**TINY), "experts": ModelConfig(**TINY, **SPARSE)}


def asked(count, temperature=1.0, seed=0, **settings):
    """Requests of many lengths, some of which end at one of eight ids before their limit."""
    rng = np.random.default_rng(seed)
    settings = {"eos_ids": tuple(range(0, 256, 32)), "temperature": temperature} | settings
    return [
        Request(
            tuple(rng.integers(1, 250, rng.integers(1, 50)).tolist()),
            SamplingParams(**{"max_new_tokens": int(rng.integers(1, 60)), "seed": int(rng.integers(2**32))} | settings),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def dense():
    """Two rows, for several tests: compiling takes longer than running."""
    return Rollouts.of(CONFIGS["dense"], rows=2, length=128, dtype="float32")


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIGS["dense"])


def test_seven_prompts_in_two_rows_equal_each_alone(dense, params):
    requests = asked(7)
    done = []
    completions, stats = dense(params, requests, lambda *counts: done.append(counts))
    dense.generator.params = params
    for request, completion in zip(requests, completions, strict=True):
        tokens, logprobs, why = dense.generator.run([request])[0]
        assert (completion.tokens.tolist(), completion.finish_reason) == (tokens, why)
        close(completion.logprobs, logprobs)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    lengths = [len(c.tokens) for c in completions]
    assert max(lengths) > 2 * min(lengths)  # or there was nothing to refill
    assert (stats.tokens, stats.refills, stats.prefilled) == (sum(lengths), 5, 7)
    assert stats.idle == pytest.approx(1 - stats.tokens / (2 * stats.steps))
    assert stats.tokens_per_second > 0
    assert done == sorted(done)
    assert done[-1] == (7, 7)


def trainer(config, params, requests, completions, temperature, dtype=jnp.float32):
    """Log-probs of the completions' tokens from one packed row, as a training step computes them."""
    wholes = [[*r.tokens, *c.tokens.tolist()] for r, c in zip(requests, completions, strict=True)]
    tokens = np.concatenate(wholes).astype(np.int32)[None]
    positions = np.concatenate([np.arange(len(w)) for w in wholes]).astype(np.int32)[None]
    segments = np.concatenate([np.full(len(w), n) for n, w in enumerate(wholes)]).astype(np.int32)[None]
    graphdef = model.declare(config, dtype=dtype)[0]

    @jax.jit
    def score(params):
        qwen2 = nnx.merge(graphdef, params)
        hidden = qwen2(tokens, positions_BT=positions, segments_BT=segments).hidden_BTD
        return cross_entropy.token_logprobs(
            hidden, qwen2.head_weight(), np.roll(tokens, -1, 1), temperature=temperature
        )

    found, start = [], 0
    for request, whole in zip(requests, wholes, strict=True):
        found.append(np.asarray(score(params))[0, start + len(request.tokens) - 1 : start + len(whole) - 1])
        start += len(whole)
    return np.concatenate(found)


@pytest.mark.parametrize("name", ["dense", *slow("experts")])
def test_logprobs_are_those_of_a_packed_training_forward(name, dense):
    config = CONFIGS[name]
    params = random_params(config)
    rollouts = dense if name == "dense" else Rollouts.of(config, rows=2, length=128, dtype="float32")
    requests = asked(5, temperature=0.7, seed=1)
    completions, _ = rollouts(params, requests)
    drawn = np.concatenate([c.logprobs for c in completions])
    close(drawn, trainer(config, params, requests, completions, 0.7))
    if name == "dense":  # or the temperature would not be in them
        assert np.abs(drawn - trainer(config, params, requests, completions, 1.0)).max() > 0.1


def test_samples_of_a_prompt_share_its_prefill_and_differ(dense, params):
    """Groups of three; each sample equals the one that its seed gives alone."""
    seeds = [SamplingParams(max_new_tokens=9, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    groups = [Request(request.tokens, settings) for request in asked(3) for settings in seeds]
    completions, stats = dense(params, groups)
    assert stats.prefilled == 3
    assert len({tuple(c.tokens) for c in completions}) == 9
    alone, _ = dense(params, groups[4:5])
    assert alone[0].tokens.tolist() == completions[4].tokens.tolist()


def test_weights_are_taken_as_they_are_and_given_back(dense, params):
    """Not copied, not donated, not held; and it is today's weights that answer."""
    placed = dense._placed(params)
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True):
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    before, requests = dense.generator.params, asked(3)
    first, _ = dense(params, requests)
    assert dense.generator.params is before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    other, _ = dense(random_params(CONFIGS["dense"], seed=1), requests)
    again, _ = dense(params, requests)
    assert [c.tokens.tolist() for c in again] == [c.tokens.tolist() for c in first]
    assert [c.tokens.tolist() for c in other] != [c.tokens.tolist() for c in first]


def test_nothing_recompiles_in_steady_state(dense, params):
    """Other prompts, numbers of them, settings and weights; XLA's compilations are counted too."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    chunks = len(dense.generator.buckets.chunks)
    dense(
        params, [Request((1,) * n, SamplingParams(max_new_tokens=2)) for n in (2, 100)]
    )  # both sizes of chunk that fit
    warm, xla = list(dense.generator.programs), len(compiled)
    own = [p for p in warm if "cache=128" in p]
    assert len(own) == len(set(own)) <= 2 + chunks, own
    for seed in range(5):
        dense(params, asked(seed + 2, temperature=0.5 * seed, seed=seed, top_k=seed, top_p=0.9))
    assert dense.generator.programs == warm
    assert len(compiled) == xla


@pytest.mark.slow
def test_bfloat16_differs_from_the_trainer_by_rounding():
    """Measured on a CPU: 0.0025 on average, 0.11 at most. Activations are rounded to 8 bits in both, not in the same
    order of additions, so that a rounding that falls the other way is passed on through the layers."""
    config = CONFIGS["dense"]
    params = random_params(config, dtype=jnp.bfloat16)
    rollouts = Rollouts.of(config, rows=2, length=128)
    requests = asked(8, seed=3, ignore_eos=True)
    completions, _ = rollouts(params, requests)
    drawn = np.concatenate([c.logprobs for c in completions])
    difference = np.abs(drawn - trainer(config, params, requests, completions, 1.0, jnp.bfloat16))
    message = f"mean {difference.mean():.4f}, max {difference.max():.4f} of {difference.size} tokens"
    assert difference.mean() < 0.01 and difference.max() < 0.5, message


def test_bad_requests_are_named(dense, params):
    good = asked(1)[0]

    def refused(request, match):
        with pytest.raises(UserError, match=match):
            dense(params, [good, request, good])

    refused(Request((1,) * 100, SamplingParams(max_new_tokens=29)), "prompt 2 of 3 has 100 tokens.* leaves 28 of 128")
    refused(Request((1,) * 600, SamplingParams()), "prompt 2 of 3 has 600 tokens; this model takes at most 511")
    refused(Request((), SamplingParams()), "prompt 2 of 3 is empty")
    refused(Request((999,), SamplingParams()), "prompt 2 of 3 has token id 999")
    refused(Request((1,), SamplingParams(repetition_penalty=1.1)), "prompt 2 of 3 has repetition_penalty=1.1")
    with pytest.raises(UserError, match="rows=0"):
        Rollouts.of(CONFIGS["dense"], rows=0, length=128)
    assert dense(params, [])[0] == []


AXES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "trained", "rank"),
    slow(("one key head", {"fsdp": 8}, 0), ("one key head", AXES, 0), ("dense", {"fsdp": 8}, 2)),
)
def test_a_mesh_gives_what_one_device_gives(name, trained, rank, eight):
    """Rows and slots are divided, weights come from the trainer's mesh, this one or another, and tensor does not divide
    the single key head. rank: with adapters over int8 weights."""
    eight("eight_devices", "rollouts", name, AXES, trained, rank)
