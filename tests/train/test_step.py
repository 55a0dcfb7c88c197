# SPDX-License-Identifier: Apache-2.0
"""One step: sums and not means of means, packing changes nothing, what is not finite never reaches the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from few import slow
from qwen2_jax import model
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens.packing import Batch, stack
from qwen2_jax.model import mlp
from qwen2_jax.train import Guard, Moe, Optim, Pretrain, step
from qwen2_jax.train.optim import optimizer
from qwen2_jax.weights.params import is_spec
from tiny import CONFIGS, random_params

LENGTH = 16
RUN = Pretrain(
    model=CONFIGS["dense"],
    tokenizer="none is read here",
    data=Data(sources=(Source(path="none is read here"),)),
    rows=4,
    length=LENGTH,
    steps=20,
    optim=Optim(lr=1e-2, schedule="constant", decay=0.0),
    dtype="float32",
    remat=None,
)


@functools.cache  # one program serves all tests of a trainer
def trainer_of(config="dense", **changes):
    config = CONFIGS[config]
    return step.Trainer(dataclasses.replace(RUN, model=config, **changes), config, 20)


def guarded():
    """One program for the tests of what a step does beside its gradients: the average, the guard, what is skipped."""
    return trainer_of(ema=0.15, guard=Guard(spike=6.0))


def random_batch(rows=4, length=LENGTH, seed=0, vocabulary=96) -> Batch:
    """Two documents per row, some padding at the end, two thirds of the positions targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocabulary, (rows, length + 1)).astype(np.int32)
    segments, positions = np.full((rows, length), -1, np.int32), np.full((rows, length), -1, np.int32)
    for row in range(rows):
        first, end = int(rng.integers(3, length // 2)), int(rng.integers(length - 4, length + 1))
        segments[row, :first], segments[row, first:end] = 0, 1
        positions[row, :first], positions[row, first:end] = np.arange(first), np.arange(end - first)
    inside = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    weights = (inside & (segments >= 0) & (rng.random((rows, length)) < 0.66)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


@functools.cache
def program(trainer):
    return jax.jit(lambda params, batch: trainer._gradients(params, None, batch))


def gradients(trainer, params, batch):
    sums, _, grads = program(trainer)(params, jax.tree.map(jnp.asarray, batch))
    return float(sums.loss.mean()), grads


def assert_close(got, want, tolerance=2e-5):
    """Float32 sums in another order: at most 4.5e-6 of a leaf's largest entry where this module uses it, measured."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_four_micro_batches_with_remat_equal_one_batch_without():
    """Also where the targets are spread unevenly: a mean of means would weigh a sparse micro-batch too much."""
    batch = random_batch()
    batch.weights_BT[0, 2:] = 0
    params = random_params(CONFIGS["dense"])
    loss, grads = gradients(trainer_of(), params, batch)
    again, split = gradients(trainer_of(accumulate=4, remat="full"), params, batch)
    assert again == pytest.approx(loss, rel=1e-6)  # a float32 sum in another order
    assert_close(split, grads)


@pytest.mark.slow  # its sums are those of the dense model above; transformers' are in test_golden_training.py
def test_micro_batches_of_a_sparse_model_add_up():
    """Without its balancing loss, which is not linear in the tokens, a sparse model's gradient is a sum as well."""
    batch, params = random_batch(), random_params(CONFIGS["moe"])
    plain = Moe(load_balancing=0.0)
    _, grads = gradients(trainer_of("moe", moe=plain), params, batch)
    _, split = gradients(trainer_of("moe", moe=plain, accumulate=2), params, batch)
    assert_close(split, grads)


@pytest.mark.parametrize("name", slow("dense", "moe"))  # quick: test_golden_training.py
def test_packed_equals_unpacked(name):
    """Documents in one row have the loss and the gradient that they have in rows of their own."""
    packed, params = random_batch(rows=2), random_params(CONFIGS[name])
    alone = []
    for row in range(2):
        for segment in range(2):
            here = packed.segments_BT[row] == segment
            fields = {}
            for field, empty in zip(Batch._fields[:5], (0, 0, 0.0, -1, -1), strict=True):
                values = getattr(packed, field)[row]
                fields[field] = np.full_like(values, empty)
                fields[field][: here.sum()] = values[here] if field != "segments_BT" else 0
            alone.append(Batch(**fields))
    unpacked = stack(alone)
    loss, grads = gradients(trainer_of(name), params, packed)
    again, apart = gradients(trainer_of(name), params, unpacked)
    assert again == pytest.approx(loss, rel=1e-6)  # a float32 sum in another order
    assert_close(apart, grads)


@pytest.mark.parametrize("remat", slow("full", "dots"))  # quick: together with micro-batches, above
def test_remat_changes_no_number(remat):
    batch, params = random_batch(), random_params(CONFIGS["dense"])
    assert_close(gradients(trainer_of(remat=remat), params, batch)[1], gradients(trainer_of(), params, batch)[1])


def test_weights_stay_float32_under_bfloat16_compute():
    """bfloat16 rounds what passes through it, not what is stored; the router is not rounded."""
    trainer = trainer_of("moe", dtype="bfloat16")
    params = random_params(CONFIGS["moe"])
    copy = jax.eval_shape(lambda params: trainer.compute(params, None), params)
    dtypes = {step.group(spec): leaf.dtype for spec, leaf in flat(trainer.model_specs, copy)}
    assert {str(d) for name, d in dtypes.items() if name != "router"} == {"bfloat16"}
    # What a step gives back is what it was given: the slow test below and test_loop.py run such steps.
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(trainer.init, params).params)} == {"float32"}


@pytest.mark.slow  # quick: the dtypes, above
def test_a_step_in_bfloat16_has_nearly_float32s_loss():
    trainer = trainer_of("moe", dtype="bfloat16")
    state, metrics = trainer.step(trainer.init(random_params(CONFIGS["moe"])), trainer.place(random_batch()))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    wide = trainer_of("moe")
    exact = float(wide.step(wide.init(random_params(CONFIGS["moe"])), wide.place(random_batch()))[1]["loss"])
    assert float(metrics["loss"]) == pytest.approx(exact, rel=0.02)  # one forward pass in bfloat16, whose unit is 2**-8


def flat(specs, tree):
    return zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(tree), strict=True)


def poisoned(params):
    return params | {"embed_VD": params["embed_VD"].at[5].set(jnp.nan)}


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    trainer = guarded()
    params = poisoned(random_params(CONFIGS["dense"]))
    state = trainer.init(jax.tree.map(jnp.copy, params))
    before = jax.tree.map(np.asarray, state)
    bad, good = random_batch(), random_batch(seed=1)
    bad.tokens_BT[0, 0] = 5
    for batch in (good.tokens_BT, good.targets_BT):
        batch[batch == 5] = 6  # a tied head meets token 5 anyway: the whole vocabulary is in every softmax
    state, metrics = trainer.step(state, trainer.place(bad))
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "optimizer", "ema"):
        for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (int(state.step), int(state.health.skipped), int(state.health.in_a_row)) == (1, 1, 1)
    cured = random_params(CONFIGS["dense"])
    state, metrics = trainer.step(state._replace(params=cured), trainer.place(good))
    assert (int(state.step), int(state.health.skipped), int(state.health.in_a_row)) == (2, 1, 0)
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params))


def test_a_spike_is_skipped_and_the_mean_does_not_learn_it():
    trainer = guarded()
    state = trainer.init(random_params(CONFIGS["dense"]))
    health = step.Health(jnp.float32(3.0), jnp.float32(0.01), jnp.int32(50), jnp.int32(0), jnp.int32(0))
    state, metrics = trainer.step(state._replace(health=health), trainer.place(random_batch()))
    assert float(metrics["loss"]) > 3.6
    assert (int(state.health.applied), int(state.health.skipped)) == (50, 1)
    assert float(state.health.mean) == 3.0
    young = state.health._replace(applied=jnp.int32(5))  # the mean of a young run means nothing
    state, _ = trainer.step(state._replace(health=young), trainer.place(random_batch()))
    assert int(state.health.applied) == 6


def test_a_batch_without_targets_is_skipped():
    trainer = guarded()
    batch = random_batch()
    batch.weights_BT[:] = 0
    state, _ = trainer.step(trainer.init(random_params(CONFIGS["dense"])), trainer.place(batch))
    assert (int(state.health.applied), int(state.health.skipped)) == (0, 1)


def test_ema_is_the_average_of_the_weights():
    """Its decay begins at 1/10 and grows to the one that was asked for, here reached by none of three steps but one."""
    trainer = guarded()
    state = trainer.init(random_params(CONFIGS["dense"]))
    want = np.asarray(state.params["embed_VD"])
    for seed, decay in enumerate((1 / 10, 0.15, 0.15)):
        state, _ = trainer.step(state, trainer.place(random_batch(seed=seed)))
        want = decay * want + (1 - decay) * np.asarray(state.params["embed_VD"])
    # Terms near 1 may cancel: their rounding (2**-24 each) counts, not the small sum's.
    np.testing.assert_allclose(state.ema["embed_VD"], want, rtol=1e-6, atol=4 * 2.0**-24)
    assert trainer.weights(state) is state.ema


@pytest.mark.slow  # test_golden_training.py has it, against transformers
def test_the_balancing_loss_reaches_the_router_with_the_right_gradient():
    """Against finite differences of the published formula, computed without the training code; padding is left out."""
    config = dataclasses.replace(CONFIGS["moe"], num_hidden_layers=1)
    run = dataclasses.replace(RUN, model=config, moe=Moe(load_balancing=1.0))
    off = dataclasses.replace(run, moe=Moe(load_balancing=0.0))
    batch, params = random_batch(), random_params(config)
    path = ("stacks", 0, "blocks", 0, "moe", "router_ED")
    with_loss, without = (get(gradients(step.Trainer(r, config, 20), params, batch)[1], path) for r in (run, off))
    graphdef = model.declare(config)[0]

    def loss(router):
        from flax import nnx

        qwen2 = nnx.merge(graphdef, put(params, path, router))
        out = qwen2(
            jnp.asarray(batch.tokens_BT), positions_BT=jnp.asarray(batch.positions_BT),
            segments_BT=jnp.asarray(batch.segments_BT),
        )  # fmt: skip
        return mlp.load_balancing_loss(out.router)

    loss = jax.jit(loss)
    router = np.asarray(get(params, path))
    rng = np.random.default_rng(0)
    direction = rng.normal(size=router.shape).astype(np.float32)
    h = 1e-3
    slope = (float(loss(router + h * direction)) - float(loss(router - h * direction))) / (2 * h)
    # The difference quotient errs by O(h^2) and by float32's rounding over h, 1e-7 / 1e-3 of a loss near 1.
    assert float(((with_loss - without) * direction).sum()) == pytest.approx(slope, rel=0.02)
    real = int((batch.segments_BT >= 0).sum())
    stats = jax.jit(lambda p, b: step.Trainer(run, config, 20)._sums(p, b, 1.0)[1])(
        params, jax.tree.map(jnp.asarray, batch)
    )
    assert float(stats.tokens) == real


def get(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def put(tree, path, value):
    return value if not path else {**tree, path[0]: put(tree[path[0]], path[1:], value)}


def test_metrics_say_where_tokens_went():
    trainer = trainer_of("moe")
    batch = random_batch()
    _, metrics = trainer.step(trainer.init(random_params(CONFIGS["moe"])), trainer.place(batch))
    assert float(metrics["targets"]) == batch.weights_BT.sum()
    assert int(metrics["tokens"]) == (batch.segments_BT >= 0).sum()
    assert float(metrics["moe/dropped"]) == 0
    assert float(metrics["moe/load"].sum()) == pytest.approx(1)
    groups = {"attention", "embedding", "experts", "mlp", "norms", "router"}
    assert {name.split("/")[1] for name in metrics if name.startswith("gradient_norm/")} == groups
    total = sum(float(v) ** 2 for k, v in metrics.items() if k.startswith("gradient_norm/")) ** 0.5
    assert float(metrics["gradient_norm"]) == pytest.approx(total, rel=1e-5)  # float32 sums of squares, in two orders


@pytest.mark.parametrize("mode", slow("yarn", "dca"))  # quick: the positions, test_rope.py, and the kernel's gradients
def test_long_context_positions_train(mode):
    """The run's rotary positions reach the model: the loss differs from plain positions, and gradients are finite."""
    config = dataclasses.replace(CONFIGS["dense"], max_position_embeddings=8)
    plain = dataclasses.replace(RUN, model=dataclasses.replace(config, max_position_embeddings=16))
    batch, params = random_batch(), random_params(CONFIGS["dense"])
    params = jax.tree.map(lambda p: 2 * p, params)
    # The loss of plain positions is of an equal model without a limit, whose program other tests use.
    loss, grads = gradients(step.Trainer(dataclasses.replace(plain, long_context=mode), config, 20), params, batch)
    assert abs(loss - gradients(trainer_of(), params, batch)[0]) > 1e-4
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(grads))


def test_schedules_by_hand():
    """Worked numbers: 1000 steps, 20 of warm-up, 7e-6 to 7e-7."""
    rate = {
        name: optimizer.schedule(7e-6, Optim(lr=7e-6, schedule=name, warmup=20, final=0.1, fall=0.25), 1000)
        for name in ("linear", "cosine", "constant", "wsd")
    }
    at = lambda name, i: float(rate[name](i))
    assert at("linear", 100) == pytest.approx(6.485714e-6, rel=1e-6)
    assert at("cosine", 100) == pytest.approx(6.896979e-6, rel=1e-6)
    for name in ("linear", "cosine"):
        assert at(name, 510) == pytest.approx(3.85e-6, rel=1e-5)
        assert at(name, 1000) == pytest.approx(7e-7, rel=1e-5)
    for name in rate:
        assert at(name, 0) == 0
        assert at(name, 10) == pytest.approx(3.5e-6, rel=1e-5)
        assert at(name, 20) == pytest.approx(7e-6, rel=1e-5)
    assert at("constant", 999) == pytest.approx(7e-6)
    assert at("wsd", 750) == pytest.approx(7e-6)
    assert at("wsd", 875) == pytest.approx(3.85e-6, rel=1e-5)
    assert at("wsd", 1000) == pytest.approx(7e-7, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["adamw", *slow("adafactor")])
def test_every_algorithm_learns(algorithm):
    optim = dataclasses.replace(RUN.optim, algorithm=algorithm)
    trainer = guarded() if optim == RUN.optim else trainer_of(optim=optim)
    state, batch, losses = trainer.init(random_params(CONFIGS["dense"])), trainer.place(random_batch()), []
    for _ in range(8):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
