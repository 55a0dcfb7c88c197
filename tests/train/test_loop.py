# SPDX-License-Identifier: Apache-2.0
"""The loop: unchanged numbers, bit-exact resume, decay only on matrices, states that survive a crash."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qwen2_jax import model
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.train import DemoData, Evaluation, Muon, Optim, Pretrain, Shares, Stage, curve, loop, optimizer, snapshot

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)
CONFIG = Pretrain(
    model=TINY,
    data=DemoData(
        vocabulary=61,
        stages=(
            Stage(steps=6, rows=4, length=8, shares=Shares(text=1)),
            Stage(steps=4, rows=2, length=16, shares=Shares(text=1)),
        ),
    ),
    optim=Optim(lr=1e-2, warmup=2, muon=Muon(lr=0.02)),
    evaluation=Evaluation(every=5, rows=2),
    save_every=5,
    log_every=1,
)
QUIET = Console(file=io.StringIO())


def batch_of(config: Pretrain):
    """Counting sequences from a random start: learnable, and a function of (seed, step)."""

    def make(step: int) -> Batch:
        stage = config.stage(step)
        start = np.random.default_rng([config.seed, step]).integers(0, 64, (stage.rows, 1))
        tokens = ((start + np.arange(stage.length + 1)) % 64).astype(np.int32)
        positions = np.broadcast_to(np.arange(stage.length, dtype=np.int32), (stage.rows, stage.length))
        weights = np.ones_like(positions, np.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.zeros_like(positions), positions)

    return make


def run(tmp_path, **changes):
    config = dataclasses.replace(CONFIG, out=tmp_path, **changes)
    make = batch_of(config)
    state = loop.run(config, make, {"counting": make(9)}, console=QUIET)
    lines = curve.read(tmp_path / "metrics.jsonl")
    return state, [line["loss"] for line in lines if "loss" in line], lines


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Runs of one configuration share their compiled functions: seconds instead of a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", functools.cache(loop.Trainer))
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return (*run(folder), folder)


TEN_STEPS = [4.148550, 4.142484, 4.096027, 3.760041, 3.633233, 3.590705, 3.345039, 3.433701, 3.175420, 3.138303]


def test_ten_steps_are_unchanged(uninterrupted):
    """A change of mathematics edits these numbers on purpose."""
    np.testing.assert_allclose(uninterrupted[1], TEN_STEPS, rtol=2e-5)


def test_learns_and_scores(uninterrupted):
    _, losses, lines, _ = uninterrupted
    assert losses[-1] < losses[0] - 1
    held_out = [line["held_out"]["counting"] for line in lines if "held_out" in line]
    assert len(held_out) == 2
    assert held_out[1]["loss"] < held_out[0]["loss"]
    assert 0 <= held_out[1]["accuracy"] <= 1


def test_resume_is_bit_exact(uninterrupted, tmp_path, monkeypatch):
    """Killed after the state of step 5 was written and step 7 was logged; the rest equals the run without a stop."""
    make = batch_of(CONFIG)

    def until_step_7(step):
        if step == 7:
            raise KeyboardInterrupt
        return make(step)

    config = dataclasses.replace(CONFIG, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, until_step_7, {}, console=QUIET)
    state, losses, lines = run(tmp_path)
    want_state, want_losses, *_ = uninterrupted
    assert losses == want_losses
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_same_seed_same_loss_other_seed_other_loss(uninterrupted):
    def first_loss(seed):
        config = dataclasses.replace(CONFIG, seed=seed)
        trainer = loop.Trainer(config.model, config.optim, config.total_steps, implementation=None)
        return float(trainer.step(trainer.init(jax.random.key(seed)), batch_of(config)(0))[1]["loss"])

    assert first_loss(0) == uninterrupted[1][0]
    assert first_loss(1) != uninterrupted[1][0]


def test_a_state_of_another_model_is_refused(uninterrupted, tmp_path):
    folder = uninterrupted[-1]
    other = dataclasses.replace(CONFIG, out=folder, model=dataclasses.replace(TINY, intermediate_size=64))
    with pytest.raises(UserError, match="belongs to another configuration"):
        loop.run(other, batch_of(other), {}, console=QUIET)


def test_snapshot_round_trip_and_no_half_files(tmp_path):
    state = {"a": jnp.arange(3), "b": [jnp.float32(2.5), jnp.ones((2, 2), jnp.int32)]}
    path = tmp_path / "deep" / "state.npz"
    snapshot.save(path, state)
    back = snapshot.restore(path, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["state.npz"]


def first_update(tx, grads, params):
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


def test_decay_shrinks_matrices_and_nothing_else():
    """With zero gradients only decay moves a parameter."""
    for muon in (None, Muon()):
        _, specs = model.declare(TINY)
        params = jax.tree.map(jnp.ones_like, model.init(TINY))
        tx = optimizer.make(Optim(lr=0.1, warmup=0, decay=0.5, muon=muon), specs, 10)
        updates = first_update(tx, jax.tree.map(jnp.zeros_like, params), params)
        is_spec = lambda leaf: hasattr(leaf, "decay")
        moved = jax.tree.map(lambda s, u: bool((u != 0).all()) == s.decay, specs, updates, is_leaf=is_spec)
        assert all(jax.tree.leaves(moved)), moved


def test_muon_sees_the_matrices_of_the_file():
    """Every layer's matrix is orthogonalised by itself: singular values near one, whatever the gradient's size."""
    sparse = ModelConfig(
        model_type="qwen2_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )
    _, specs = model.declare(sparse)
    block = specs["stacks"][0]["blocks"][0]
    named = {
        "wq": (block["attention"]["wq_NHD"], ((3,), (1, 2))),
        "wo": (block["attention"]["wo_DNH"], ((2, 3), (1,))),
        "expert": (block["moe"]["gate_EFD"], ((3,), (2,))),
        "router": (block["moe"]["router_ED"], ((2,), (1,))),
    }
    for name, (spec, (inputs, outputs)) in named.items():
        numbers = optimizer.matrix(spec)
        assert (numbers.reduction_axis, numbers.output_axis) == (inputs, outputs), name
    for spec in (
        specs["embed_VD"],
        block["attention_norm_D"],
        block["attention"]["bq_NH"],
        block["moe"]["shared_gate_D"],
    ):
        assert optimizer.matrix(spec) is None
    _, specs = model.declare(TINY)
    tx = optimizer.make(Optim(lr=1.0, warmup=0, decay=0.0, muon=Muon(lr=1.0)), specs, 10)
    params = model.init(TINY)
    grads = jax.tree.map(lambda p: 100 * jax.random.normal(jax.random.key(1), p.shape), params)
    updates = first_update(tx, grads, params)
    attention = updates["stacks"][0]["blocks"][0]["attention"]
    for update in (attention["wq_NHD"].reshape(2, 32, 32), attention["wo_DNH"].reshape(2, 32, 32)):
        singular = np.linalg.svd(np.asarray(update), compute_uv=False)
        assert singular.max() < 1.4
        assert np.median(singular) > 0.6


def test_schedule_warms_up_stays_and_falls():
    rate = optimizer.schedule(1.0, Optim(lr=1.0, warmup=10, fall=0.25, final=0.1), 100)
    np.testing.assert_allclose([float(rate(i)) for i in (0, 5, 10, 74, 100)], [0, 0.5, 1, 1, 0.1], atol=1e-6)


def test_curve_is_drawn(uninterrupted, tmp_path):
    pytest.importorskip("matplotlib")
    curve.draw(uninterrupted[-1] / "metrics.jsonl", tmp_path / "docs" / "loss.png")
    assert (tmp_path / "docs" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_token_weighted(tmp_path):
    log = loop.Log(tmp_path / "m.jsonl", QUIET, dataclasses.replace(CONFIG, log_every=2))
    log.start(0, 0)
    for step, (loss, targets) in enumerate(((1.0, 30.0), (5.0, 10.0)), start=1):
        log.step(
            step, 40, {"loss": jnp.float32(loss), "targets": jnp.float32(targets), "gradient_norm": jnp.float32(0)}
        )
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert (line["loss"], line["tokens"], line["step"]) == (2.0, 80, 2)
