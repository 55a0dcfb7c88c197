# SPDX-License-Identifier: Apache-2.0
"""The divergence of two models against numpy, models run a layer at a time, and the command."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qwen2_jax
from qwen2_jax.checkpoint.by_layer import ByLayer
from qwen2_jax.errors import UserError
from qwen2_jax.eval.__main__ import main
from qwen2_jax.eval.divergence import Reference
from qwen2_jax.model import divergence as chunks
from qwen2_jax.weights.weight import matmul

TEXT = Path(__file__).parents[2] / "README.md"


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_against_numpy(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 8)  # 13 positions: a whole chunk and a part of one
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((13, 6)).astype(np.float32) for _ in range(2))
    a, b = (rng.standard_normal((40, 6)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, 40, (1, 13))
    found = chunks.divergence(x[None], jnp.asarray(a), y[None], jnp.asarray(b), tokens)
    p, q = (softmax((h @ head.T).astype(np.float64)) for h, head in ((x, a), (y, b)))
    kl = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(found.kl_M, kl, rtol=1e-4)
    np.testing.assert_array_equal(found.same_M, p.argmax(-1) == q.argmax(-1))
    summary = found.summary()
    assert summary["positions"] == 13
    for key, want in (("mean_kl", kl.mean()), ("median_kl", np.median(kl)), ("p99_kl", np.quantile(kl, 0.99))):
        np.testing.assert_allclose(summary[key], want, rtol=1e-4)
    loss_a, loss_b = (-np.log(of[np.arange(12), tokens[0, 1:]]).mean() for of in (p, q))  # the last token has no next
    for key, want in (("a", loss_a), ("b", loss_b), ("ratio", loss_b - loss_a)):
        np.testing.assert_allclose(summary[f"perplexity_{key}"], np.exp(want), rtol=1e-4)


def test_a_layer_at_a_time_is_the_model():
    ids = np.random.default_rng(1).integers(0, 2000, (3, 20)).astype(np.int32)
    model = ByLayer("demo")
    logits = matmul(jnp.asarray(model.hidden(ids)), model.head(), dtype=jnp.float32)
    # Largest difference measured: 2e-5, of logits up to 13.
    np.testing.assert_allclose(logits, qwen2_jax.load("demo", dtype="float32").logits(ids), atol=1e-4)


@pytest.fixture
def run(capsys):
    def run(*flags):
        assert main(["compare", "demo", "demo", "--text", str(TEXT), "--tokens", "256", "--length", "64", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.slow  # quick: int8, below
def test_int4_is_further_away_than_int8(run):
    int8 = run("--dtype-b", "int8")
    int4 = run("--dtype-a", "int8", "--dtype-b", "int4")
    assert int8["mean_kl"] < int4["mean_kl"] < 0.2


def test_the_command(run, tmp_path, capsys):
    same = run()
    assert same.pop("perplexity_a") == same.pop("perplexity_b") > 1
    assert same == {
        "mean_kl": 0.0, "median_kl": 0.0, "p99_kl": 0.0, "top1": 1.0, "perplexity_ratio": 1.0, "positions": 256,
    }  # fmt: skip
    cache = run("--cache-dtype-b", "int8")
    assert 0 < cache["mean_kl"] < 2e-3 and 0.9 < cache["perplexity_ratio"] < 1.1
    int8 = run("--dtype-b", "int8", "--json", str(tmp_path / "out.json"))
    assert 0 < int8["mean_kl"] < 2e-3 and int8["top1"] > 0.95  # 4e-4 and 0.99 were measured
    assert json.loads((tmp_path / "out.json").read_text()) == int8
    assert main(["compare", "demo", "demo", "--text", "absent.txt"]) == 2
    assert "absent.txt cannot be read" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary():
    with pytest.raises(UserError, match="token id 99999"):
        Reference("demo", np.full((1, 4), 99999, np.int32))
