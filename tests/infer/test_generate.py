# SPDX-License-Identifier: Apache-2.0
"""The token layer: decoding equals full forward passes, batches equal their rows alone, and nothing recompiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from few import slow
from qwen2_jax import model
from qwen2_jax.config import DualChunk, ModelConfig, RopeScaling
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine.buckets import Buckets, context_limit
from qwen2_jax.infer.engine.programs import Generator, Request
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from tiny import random_params
from tolerance import close

from .conftest import TINY

SPARSE = {
    "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
DCA = DualChunk(chunk_size=16, local_size=4, original_max_position_embeddings=0)
VARIANTS = {  # name: (changes to TINY, unroll, long_context)
    "dense": ({}, False, "auto"),
    "heads 14:2, unrolled": ({"hidden_size": 112, "num_attention_heads": 14}, True, "auto"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, False, "auto"),
    "dual chunk": ({"dual_chunk_attention_config": DCA}, True, "dca"),
    "yarn": (
        {"rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16)},
        False,
        "auto",
    ),
    "experts": (SPARSE, False, "auto"),
    "experts every second layer": ({**SPARSE, "decoder_sparse_step": 2}, True, "auto"),
}


def make(changes=None, unroll=False, **options):
    config = ModelConfig(**{**TINY, **(changes or {})})
    params = random_params(config, unroll=unroll)
    graphdef, _ = model.declare(config, unroll=unroll)
    options = {"dtype": jnp.float32, "buckets": Buckets(rows=1, chunks=(16,), limit=2048), **options}
    return Generator(graphdef, params, config, unroll=unroll, **options)


@pytest.fixture(scope="module")
def dense():
    """One generator for several tests: compiling takes longer than running."""
    return make(buckets=Buckets(rows=2, chunks=(8, 32), limit=2048))


def prompt(length, seed=0):
    return tuple(np.random.default_rng([seed, length]).integers(0, 250, length).tolist())


QUICK = ("dual chunk",)  # test_parity.py has the others' greedy tokens, too


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name)[0] for name in VARIANTS])
def test_decoding_equals_a_full_forward_at_every_position(name, dense):
    """Greedy tokens of a ragged batch are the argmax of cache-free logits, and their log-probabilities agree."""
    changes, unroll, mode = VARIANTS[name]
    generator = make(changes, unroll) if changes else dense
    requests = [Request(prompt(n), SamplingParams(max_new_tokens=25)) for n in (23, 1)]
    answers = generator.run(requests, mode)
    wholes = [[*request.tokens, *tokens] for request, (tokens, _, _) in zip(requests, answers, strict=True)]
    padded = np.asarray([whole + [0] * (48 - len(whole)) for whole in wholes])
    all_logits = generator.logits(padded, mode)
    for request, (tokens, logprobs, why), logits in zip(requests, answers, all_logits, strict=True):
        assert (len(tokens), why) == (25, "length")
        start = len(request.tokens) - 1
        logits = logits[start : start + 25]
        assert tokens == logits.argmax(-1).tolist()
        want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[:, None], 1)[:, 0]
        close(logprobs, want, units=128)  # step by step and all at once: 60 was measured
    assert len(set(answers[0][0])) > 3  # a model that repeats itself would prove little
    if name in ("dense", "dual chunk"):
        scored = generator.logprobs(wholes, mode)[0]  # prefilled in chunks, through the cache
        close(scored[22:], answers[0][1])


def test_a_ragged_batch_equals_each_row_alone(dense):
    """Different lengths, settings and limits; sampled and greedy; a row of padding in two of the batches."""
    requests = [
        Request(prompt(40), SamplingParams(max_new_tokens=12)),
        Request(prompt(17), SamplingParams(max_new_tokens=20, temperature=0.8, top_k=10, top_p=0.9, seed=1)),
        Request(prompt(1), SamplingParams(max_new_tokens=20, repetition_penalty=20.0)),
        Request(prompt(33), SamplingParams(max_new_tokens=18, temperature=1.5, min_p=0.05, seed=2**32 - 1)),
    ]
    three, four = dense.run(requests[:3]), dense.run(requests)
    for request, together, fewer in zip(requests, four, [*three, four[3]], strict=True):
        tokens, logprobs, why = dense.run([request])[0]
        assert (tokens, why) == (together[0], together[2]) == (fewer[0], fewer[2])
        close(logprobs, together[1])
    penalised = four[2][0]
    assert len(set(penalised)) == len(penalised)  # so strong a penalty leaves no token for a second time


def test_ends_at_any_of_several_ids_unless_ignored(dense):
    generator = dense
    free = generator.run([Request(prompt(12), SamplingParams(max_new_tokens=12))])[0][0]
    first = next(i for i, t in enumerate(free) if t not in free[:i] and i > 3)
    settings = SamplingParams(max_new_tokens=12, eos_ids=(271, free[first]))
    tokens, _, why = generator.run([Request(prompt(12), settings)])[0]
    assert (tokens, why) == (free[: first + 1], "stop")
    ignoring = dataclasses.replace(settings, ignore_eos=True)
    assert (
        generator.run([Request(prompt(12), ignoring)])[0]
        == generator.run([Request(prompt(12), SamplingParams(max_new_tokens=12))])[0]
    )
    with pytest.raises(UserError, match="at most 8"):
        generator.run([Request(prompt(3), SamplingParams(eos_ids=tuple(range(9))))])


def test_limits_are_held_and_named():
    generator = make({"max_position_embeddings": 32})
    limit = context_limit(generator.config, "auto")
    assert limit == 4 * 32
    tokens, _, why = generator.run([Request(prompt(limit - 2), SamplingParams(max_new_tokens=50))])[0]
    assert (len(tokens), why) == (2, "length")
    with pytest.raises(UserError, match="128 tokens.*at most 127"):
        generator.run([Request(prompt(limit), SamplingParams())])
    with pytest.raises(UserError, match="at most 31 .127 with long_context"):
        generator.run([Request(prompt(60), SamplingParams())], "off")
    with pytest.raises(UserError, match="id 272"):
        generator.run([Request((1, 272), SamplingParams())])
    with pytest.raises(UserError, match="empty"):
        generator.run([Request((), SamplingParams())])


def test_nothing_recompiles_in_steady_state(dense):
    """A hundred batches of random lengths, sizes, settings and rotary modes run on the programs of the first few.

    XLA's own compilations are counted beside the generator's count, which cannot see one that needs no new trace.
    """
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    generator = dense
    rng = np.random.default_rng(0)

    def batch(lengths, temperatures=(0.0, 0.7, 1.0)):
        requests = []
        for n in lengths:
            settings = SamplingParams(
                max_new_tokens=int(rng.integers(1, 6)), temperature=float(rng.choice(temperatures)),
                top_k=int(rng.integers(0, 99)), top_p=float(rng.uniform(0.1, 1.0)), seed=int(rng.integers(99)),
                eos_ids=tuple(rng.integers(0, 250, 2).tolist()),
            )  # fmt: skip
            requests.append(Request(prompt(int(n)), settings))
        mode = str(rng.choice(["auto", "off", "yarn", "dca"]))
        started = generator.start([generator.check(request, mode) for request in requests], mode)
        while not started.finished.all():
            started.advance(int(rng.integers(1, 17)))

    for rows in (2, 4):
        batch([33] * rows, [0.0])
        batch([9] * rows, [1.0])
    generator.logprobs([prompt(30), prompt(80)])
    warm, xla = generator.compiles, len(compiled)
    assert len(set(generator.programs)) == warm, generator.describe()
    # Other tests of this module share the generator, and some of their rows have a penalty.
    mine = [program for program in generator.programs if "cache=256" in program and "penalty" not in program]
    assert len(mine) == 2 * (2 + 2) + 2, generator.describe()
    for _ in range(100):
        batch(rng.integers(1, 240, rng.integers(1, 5)))
    generator.logprobs([prompt(int(n)) for n in rng.integers(2, 250, 2)])
    assert generator.compiles == warm, generator.describe()
    assert len(compiled) == xla


def test_buckets_cover_with_little_padding():
    buckets = Buckets(rows=2, chunks=(32, 128, 512), limit=5000)
    for n in range(1, 2000):
        sizes = buckets.cut(n)
        assert sum(sizes) >= n
        assert sum(sizes[:-1]) < n
        assert sum(sizes) - n < max(32, n / 2)
        assert buckets.length(n) >= n
    assert buckets.cut(0) == []
    assert [buckets.batch(n) for n in (1, 2, 3, 5)] == [2, 2, 4, 8]
    assert sorted({buckets.length(n) for n in range(1, 5001)}) == [256, 512, 1024, 2048, 4096, 5120]
    assert "256, 512, 1024, 2048, 4096, 5120" in str(buckets)
