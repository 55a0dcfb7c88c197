# SPDX-License-Identifier: Apache-2.0
"""What test_mesh.py and test_rollouts.py ask of a worker (tests/worker.py) that has eight devices."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np

import qwen2_jax
from qwen2_jax import model
from qwen2_jax.config import DualChunk, ModelConfig
from qwen2_jax.infer.cli import main
from qwen2_jax.infer.engine import lowering
from qwen2_jax.infer.engine.buckets import Buckets
from qwen2_jax.infer.engine.programs import Generator, Request
from qwen2_jax.infer.engine.rollouts import Rollouts
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.lm import LM
from qwen2_jax.model import lora
from qwen2_jax.model.lora import Lora
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import hlo
from qwen2_jax.plan.infer import InferenceJob, make_generator
from qwen2_jax.train.step import shardings_of
from qwen2_jax.weights import int8, weight
from qwen2_jax.weights.forms import FORMS
from recorded import recorded_arrays
from tiny import random_params
from tolerance import close

DENSE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "eos_token_id": 95,
}
SPARSE = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
DCA = DualChunk(chunk_size=24, local_size=4, original_max_position_embeddings=0)
MODELS = {  # with the long_context that they are loaded with
    "dense": (ModelConfig(**DENSE), "auto"),
    "moe": (ModelConfig(**DENSE | SPARSE), "auto"),
    "one key head": (ModelConfig(**DENSE | {"num_key_value_heads": 1}), "off"),
    "dca": (ModelConfig(**DENSE, dual_chunk_attention_config=DCA), "dca"),
    "sliding": (ModelConfig(**DENSE, use_sliding_window=True, sliding_window=7, max_window_layers=1), "auto"),
}
LENGTHS = (70, 9, 1, 33)  # of the prompts: one is a token, one is beyond the first share of the slots


def recorded(folder: str, axes: dict[str, int]) -> None:
    """A folder of tests/golden, loaded onto a mesh: logits and greedy tokens are those recorded."""
    golden = recorded_arrays(f"{folder}/golden.npz")
    lm = qwen2_jax.load(folder, dtype="float32", mesh=sharding.make_mesh(**axes))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params)), "nothing was split"
    assert np.abs(lm.logits(golden["tokens"]) - golden["logits"]).max() < 1e-4
    prompts = [row[:n].tolist() for row, n in zip(golden["prompts"], golden["prompt_lengths"], strict=True)]
    answers = lm.generate(prompts, max_new_tokens=24, ignore_eos=True)
    assert [answer.token_ids for answer in answers] == golden["generated"].tolist()


def compare(name: str, axes: dict[str, int]) -> None:
    """Tokens, greedy and sampled, their log-probabilities, scores and logits; and a second batch compiles nothing."""
    rows = 8 if axes.get("fsdp") == 8 else 4  # with four of padding, so that rows are divided too
    alone, together = _alone(name, rows), _answers(name, rows, sharding.make_mesh(**axes))
    assert alone[0] == together[0]
    for a, b in zip(alone[1:], together[1:], strict=True):
        close(a, b, units=256)


@functools.cache
def _alone(name, rows):
    return _answers(name, rows, None)


def _answers(name, rows, mesh):
    config, mode = MODELS[name]
    graphdef, specs = model.declare(config, unroll=True)
    params = random_params(config, unroll=True)
    if mesh is not None:
        place = lambda x, spec: jax.device_put(x, sharding.sharding(spec.axes, spec.shape, mesh, sharding.SERVING))
        params = jax.tree.map(place, params, specs)
    buckets = Buckets(rows=rows, chunks=(16, 32), limit=4096)
    generator = Generator(graphdef, params, config, dtype=jnp.float32, unroll=True, mesh=mesh, buckets=buckets)
    assert mesh is None or not generator.shardings.cache(config, rows, 256).is_fully_replicated
    prompts = [tuple(np.random.default_rng(n).integers(100, 4096, n).tolist()) for n in LENGTHS]
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=temperature))
        for prompt, temperature in zip(prompts, (0, 0.8, 0, 0), strict=True)
    ]
    tokens, logprobs, _ = zip(*generator.run(requests, mode), strict=True)
    again = generator.run(requests[::-1], mode)[::-1]
    assert [answer[0] for answer in again] == list(tokens)
    programs = generator.for_cache(rows, 256)
    assert (programs.decode._cache_size(), programs.prefill._cache_size()) == (1, 2)  # two sizes of chunk
    scores = generator.logprobs(prompts, mode)
    logits = generator.logits(np.asarray(prompts[:1]), mode)
    return tokens, np.concatenate(logprobs), np.concatenate(scores), logits


def quantised(name: str, axes: dict[str, int], dtype: str) -> None:
    """Weights in another form, spread over a mesh: the logits of one device, although groups of inputs are divided."""
    config, mode = MODELS[name]
    ids, said = np.random.default_rng(0).integers(100, 4096, (2, 9)), []
    specs = model.declare(config, unroll=True)[1]
    for mesh in (None, sharding.make_mesh(**axes)):
        params = weight.convert(random_params(config, unroll=True), specs, FORMS[dtype].round)
        if mesh is not None:
            params = weight.put(params, shardings_of(specs, mesh, sharding.SERVING))
            down = params["stacks"][0]["blocks"][0]["moe"]["down_EDF"]
            assert dtype != "int4" or len({str(shard.index) for shard in down.scale.addressable_shards}) == 8
        lm = LM(config, params, dtype="float32", unroll=True, mesh=mesh, long_context=mode)
        said.append((lm.logits(ids), lm.generate([ids[0].tolist()], max_new_tokens=6, ignore_eos=True)[0].token_ids))
    close(said[1][0], said[0][0], units=4096)  # int8 products on a CPU keep 15 bits of their inputs
    assert said[0][1] == said[1][1]


def command_line(flags: list[str]) -> None:
    """infer.py's answer with the flags is the one without."""
    command = ["--raw", "--dtype", "float32", "--max-new-tokens", "12", "--temperature", "0", "What is 11 + 22?"]
    said = []
    for more in ([], flags):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main.main([*command, *more]) == 0
        said.append(out.getvalue())
    assert said[0] == said[1] != ""


def rollouts(name: str, axes: dict[str, int], trained: dict[str, int], rank: int = 0) -> None:
    """Tokens and log-probabilities, of more prompts than rows; the second call compiles nothing.

    trained: the mesh that the weights come from. rank: of adapters beside them, over int8 weights.
    """
    alone = _rollouts(name, None, None, rank)
    together = _rollouts(name, sharding.make_mesh(**axes), sharding.make_mesh(**trained), rank)
    for a, b in zip(alone, together, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        close(a.logprobs, b.logprobs, units=256)


def _rollouts(name, mesh, trained, rank):
    config, mode = MODELS[name]
    params = random_params(config)
    if trained is not None:
        place = lambda x, spec: jax.device_put(x, sharding.sharding(spec.axes, spec.shape, trained))
        params = jax.tree.map(place, params, model.declare(config)[1])
    if rank:
        settings = Lora(rank=rank)
        fresh = jax.tree.map(lambda x: x + 0.1, lora.init(config, settings, jax.random.key(0)))  # b is 0 at first
        small = int8.quantize(dict(params["stacks"]), model.declare(config)[1]["stacks"])
        params = lora.attach(params | {"stacks": small}, fresh, settings)
    made = Rollouts.of(config, rows=8, length=128, dtype="float32", mesh=mesh, long_context=mode)
    generator = made.generator
    assert mesh is None or not generator.shardings.cache(generator.config, 8, 128).is_fully_replicated
    requests = [
        Request(tuple(range(100, 100 + length)), SamplingParams(max_new_tokens=3 * new, temperature=0.9, seed=new))
        for new, length in enumerate(LENGTHS * 3, start=1)
    ]
    completions, stats = made(params, requests)
    assert (len({tuple(c.tokens) for c in completions}), stats.refills) == (12, 4)
    again, _ = made(params, requests)
    assert [c.tokens.tolist() for c in again] == [c.tokens.tolist() for c in completions]
    assert generator.for_cache(8, 128).decode._cache_size() == made._admit._cache_size() == 1
    if mesh is not None:  # one row is exchanged to admit a prompt, not the staging cache
        cache, small = (lowering._cache(generator, rows, 128) for rows in (8, made.staging_rows))
        at = lowering._shape(generator, (), jnp.int32)
        found = hlo.collectives(made._admit.lower(cache, small, at, at).compile().as_text(), range(8))
        heads = generator.config.num_key_value_heads // mesh.shape["tensor"]  # of each device
        row = generator.config.num_hidden_layers * 2 * 128 * heads * generator.config.head_dim * 4
        assert sum(c.bytes for c in found) == row
    return completions


def collectives(name: str, axes: dict[str, int]) -> None:
    """No message is larger than the activations of all tokens, three rotated queries together; no table, no cache."""
    config, mode = MODELS[name]
    rows, chunk, slots = 8, 32, 4096
    mesh = sharding.make_mesh(**axes)
    generator = make_generator(config, mesh, InferenceJob(dtype="float32", long_context=mode))
    activations = 4 * 3 * config.intermediate_size  # bytes of a token
    cache = rows * config.num_key_value_heads * slots * config.head_dim * 4
    table = config.vocab_size * config.hidden_size * 4
    for tokens, lowered in (
        (rows * chunk, lowering.lower_prefill(generator, chunk, rows, slots, mode)[0]),
        (rows, lowering.lower_decode(generator, rows, slots, mode)[0]),
    ):
        found = hlo.collectives(lowered.compile().as_text(), range(8))
        assert found, "on a mesh something has to move"
        if "fsdp" in axes:  # each device has the logits of some columns of the head: they are added up
            logits = rows * config.vocab_size // axes.get("tensor", 1) * 4
            found = [c for c in found if (c.kind, c.bytes) != ("all-reduce", logits)]
        largest = max(found, key=lambda c: c.bytes)
        assert 3 * tokens * activations < min(cache, table)
        assert largest.bytes <= tokens * activations, f"{largest} of {tokens} tokens"
