# SPDX-License-Identifier: Apache-2.0
"""Chunked log-probabilities and cross-entropy equal the plain ones and never hold all logits."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.model.cross_entropy import _cut, cross_entropy, token_logprobs
from tolerance import assert_no_worse, in_float64

B, T, D, V = 2, 13, 8, 50
CHUNKS = [1, 5, 26, 1024]


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, head, targets, 1.5 * (jax.random.uniform(keys[3], (B, T)) < 0.6)


def plain(hidden, head, targets, temperature=1.0):
    logits = jnp.einsum("btd,vd->btv", hidden, head) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def close(got, definition, *args):
    """As close to `definition` in float64 as it is itself in float32, by a factor of two."""
    naive, exact = jax.jit(definition)(*args), in_float64(definition, *args)
    for ours, theirs, true in zip(*map(jax.tree.leaves, (got, naive, exact)), strict=True):
        assert_no_worse(ours, theirs, true)


def squares_of(logprobs_of):
    """((sum of squares, log-probabilities), gradients) as a function of hidden states and head."""

    def squares(hidden, head):
        logprobs = logprobs_of(hidden, head)
        return (logprobs**2).sum(), logprobs

    return jax.value_and_grad(squares, (0, 1), has_aux=True)


@pytest.mark.parametrize(("chunk", "temperature"), [*((chunk, 1.0) for chunk in CHUNKS), (5, 0.7)])
def test_equal_to_log_softmax_with_gradients(case, chunk, temperature):
    hidden, head, targets, _ = case
    ours = squares_of(lambda h, w: token_logprobs(h, w, targets, temperature=temperature, chunk=chunk))
    close(jax.jit(ours)(hidden, head), squares_of(lambda h, w: plain(h, w, targets, temperature)), hidden, head)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_equals_the_definition_with_gradients(case, chunk, z_loss):
    hidden, head, targets, weights = case

    def definition(hidden, head):
        logits = jnp.einsum("btd,vd->btv", hidden, head)
        z = jax.nn.logsumexp(logits, axis=-1) ** 2
        return 3 * jnp.sum(weights * (z_loss * z - plain(hidden, head, targets)))

    def chunked(hidden, head):
        return 3 * cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk=chunk).loss

    got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    close(got, jax.value_and_grad(definition, (0, 1)), hidden, head)


def test_metrics(case):
    hidden, head, targets, weights = case
    best = jnp.einsum("btd,vd->btv", hidden, head).argmax(-1)
    targets = targets.at[:, ::2].set(best[:, ::2])
    sums = jax.jit(functools.partial(cross_entropy, z_loss=0.1, chunk=7))(hidden, head, targets, weights)
    close(sums.nll, lambda h, w: -jnp.sum(weights * plain(h, w, targets)), hidden, head)
    assert sums.correct == jnp.sum(weights * (best == targets))
    assert sums.weight == weights.sum()


def test_sums_of_the_parts_are_the_sums_of_the_whole(case):
    """Rows of different numbers of targets: means of means would not add up."""
    run = jax.jit(cross_entropy)
    parts = [run(*(x if x.shape == (V, D) else x[i : i + 1] for x in case)) for i in range(B)]
    for got, want in zip(jax.tree.map(jnp.add, *parts), run(*case), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)  # eight roundings of float32: two orders of one sum


def test_padding_is_neither_loss_nor_gradient(case):
    hidden, head, targets, weights = case
    wild = jnp.where(weights[..., None] > 0, hidden, jnp.inf)
    run = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, weights).loss, (0, 1)))
    (loss, (dhidden, dhead)), (want, (_, want_dhead)) = run(wild, head), run(hidden, head)
    np.testing.assert_array_equal(loss, want)
    assert np.isfinite(dhidden).all()
    assert (np.asarray(dhidden)[weights == 0] == 0).all()
    np.testing.assert_array_equal(dhead, want_dhead)


def test_nothing_to_predict_is_zero(case):
    hidden, head, targets, weights = case
    assert [float(x) for x in jax.jit(cross_entropy)(hidden, head, targets, 0 * weights)] == [0, 0, 0, 0]


def temporaries(loss, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_a_tile_and_not_all_logits():
    """The loss part of a step of the 0.5B model at 8,192 tokens: compiled, not run."""
    rows, width, vocabulary = 8192, 896, 151_936
    shapes = [((1, rows, width), jnp.bfloat16), ((vocabulary, width), jnp.bfloat16)]
    shapes += [((1, rows), jnp.int32), ((1, rows), jnp.float32)]
    all_logits = temporaries(lambda h, w, t, m: -(m * plain(h, w, t)).sum(), *shapes)
    assert all_logits > rows * vocabulary * 4
    assert temporaries(lambda h, w, t, m: cross_entropy(h, w, t, m).loss, *shapes) < all_logits / 5
    assert temporaries(lambda h, w, t, m: (m * token_logprobs(h, w, t)).sum(), *shapes) < all_logits / 5


@pytest.mark.parametrize(("rows", "length"), [(1, 8192), (2, 13), (3, 700), (500, 1000), (512, 4096), (1000, 5)])
def test_tiles_are_no_larger_than_asked_for_and_hardly_padded(rows, length):
    n, B, C = jax.eval_shape(lambda x: _cut((x,), 768), jax.ShapeDtypeStruct((rows, length), jnp.int32))[0].shape
    assert rows == B
    assert max(768, rows) >= B * C
    assert length <= n * C < length + n


MESH = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qwen2_jax.parallel import sharding
from qwen2_jax.model.cross_entropy import cross_entropy, token_logprobs

B, T, D, V = 8, 6, 16, 64
rng = np.random.default_rng(0)
hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
targets = rng.integers(0, V, (B, T)).astype(np.int32)
weights = (rng.random((B, T)) < 0.7).astype(np.float32)
def mean(hidden, head):
    sums = cross_entropy(hidden, head, targets, weights, z_loss=0.01, chunk=2)
    return sums.loss / sums.weight
def score(hidden, head):
    return (weights * token_logprobs(hidden, head, targets, chunk=2) ** 2).sum()

mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
places = [NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("tensor", "fsdp"))]
spread = [jax.device_put(x, place) for x, place in zip((hidden, head), places)]
for loss in (mean, score):
    gradient = jax.value_and_grad(loss, (0, 1))
    want = jax.jit(gradient)(hidden, head)
    compiled = jax.jit(sharding.on(mesh, gradient)).lower(*spread).compile()
    for a, b in zip(jax.tree.leaves(compiled(*spread)), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())  # float32 sums in another order
    text = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\\w.-]+)", text))
    assert bodies, "no loop over chunks"
    for body in bodies:  # what the chunks' loop may reduce is over the vocabulary's parts: of pairs of devices
        lines = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL).group(0).splitlines()
        for line in lines:
            assert "all-reduce" not in line or f"f32[{V},{D}]" not in line and f"f32[{V // 2},{D}]" not in line, line
print("equal")
"""


def test_a_mesh_sums_the_head_s_gradient_once():
    """Eight devices, rows, width and vocabulary split: the numbers of one, no sum of the head's gradient per chunk."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
