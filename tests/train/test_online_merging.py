# SPDX-License-Identifier: Apache-2.0
"""Online merging: worked numbers, the paper against its program, exact sums, and the same steps on any mesh."""

import dataclasses
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.errors import UserError
from qwen2_jax.train import Checkpointing, Lora, OnlineMerging, Optim, Pretrain, Start, loop, step
from qwen2_jax.train.optim import online_merging, optimizer
from qwen2_jax.train.state.checkpoints import Checkpoints
from qwen2_jax.weights.params import ParamSpec
from tiny import random_params

TESTS = Path(__file__).parents[1]
PLAIN = {"lr": 1e-2, "schedule": "constant", "b1": 0.9, "b2": 0.999, "eps": 1e-8, "decay": 0.0, "clip": 0.0}


def omo(**fields) -> OnlineMerging:
    return OnlineMerging(**{"base": "none is read here", "keep": 0.5, "alpha": 0.05} | fields)


def vector(n: int, **fields) -> ParamSpec:
    """A declaration of one tensor of n numbers."""
    about = {"shape": (n,), "dtype": np.float32, "axes": ("embed",), "hf": "w", "hf_shape": (n,), "layers": ()}
    return ParamSpec(**about | {"decay": True} | fields)


# Eight numbers of the published examples follow from the others: 2 of theta and gradients that a mask drops are free.
THETA = np.array([0.52, -0.26, 0.1, 0.03, -0.385, 0.76])
TAU = np.array([0.02, -0.01, 0.0, 0.03, 0.015, -0.04])
GRADIENTS = np.array([[0.1, -0.2, 0.3, -0.4, 0.5, -0.6], [0.7, 0.1, -0.3, 0.2, 0.1, 0.05]])
TAU_KEPT = np.array([1, 0, 1, 1, 0, 1], bool)
KEPT = np.array([[1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 1]], bool)
AFTER_TWO_STEPS = {
    "paper": [0.51250000095, -0.247969798758, 0.100499999983, 0.033, -0.39449999981, 0.761756178097],
    "code": [0.505000060083, -0.235939633447, 0.100999999254, 0.036, -0.403999987983, 0.763512350414],
}


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_ondare_by_hand(variant, monkeypatch):
    """Two steps of the whole chain with given masks: scaling of survivors, and where Adam's epsilon stands."""
    masks = {"paper": [KEPT[0], TAU_KEPT, KEPT[1], TAU_KEPT], "code": [TAU_KEPT, *KEPT]}[variant]
    turns = iter(masks)
    monkeypatch.setattr(online_merging, "_drawn", lambda *_: next(turns))
    settings, specs = omo(variant=variant), {"w": vector(6)}
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(THETA)}
        tx = optimizer.make(Optim(**PLAIN, merging=settings), specs, 10)
        tau = online_merging.task_vector(settings, specs, params, {"w": jnp.asarray(THETA - TAU)}, seed=0)
        state = online_merging.with_tau(tx.init(params), tau)
        for gradient in GRADIENTS:
            updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], AFTER_TWO_STEPS[variant], rtol=0, atol=1e-12)


def one_step(settings, specs, d, tau, **fields):
    """(weights after, state) of one step from zeros whose increment is d. tau: before what is done to it once."""
    zeros = jax.tree.map(jnp.zeros_like, d)
    fields = {"decay": 0.0, "eps": 1e-8, "seed": 0} | fields
    tx = online_merging.online_merging(settings, specs, lambda count: 1.0, **fields)
    made = online_merging.task_vector(settings, specs, tau, zeros, seed=fields["seed"])
    updates, state = tx.update(d, online_merging.with_tau(tx.init(zeros), made), zeros)
    return updates, state


@pytest.mark.parametrize(
    ("variant", "want"),
    [
        ("paper", [-0.0038, -0.00285, 0, 0.0015, 0.002375, -0.002]),
        ("code", [0.001, -0.00285, 0, 0.0015, 0.002375, -0.002]),
    ],
)
def test_onties_by_hand(variant, want):
    """In the first entry increment and task vector contradict each other: the paper's winner is the code's loser."""
    d, tau = [-0.004, -0.003, 0.002, -0.001, 0.0025, 0.0005], [0.02, -0.01, 0.0, 0.03, 0.015, -0.04]
    with jax.enable_x64(True):
        got, _ = one_step(
            omo(method="onties", variant=variant), {"w": vector(6)}, {"w": jnp.array(d)}, {"w": jnp.array(tau)}
        )
        np.testing.assert_allclose(got["w"], want, rtol=0, atol=1e-15)


STACKED = {"w": vector(6, shape=(3, 2, 4, 5), hf="e.{e}.w", hf_shape=(4, 5), layers=(0, 2, 5))}


def rounded(shape, seed=0):
    """Random numbers of which many are equal in size."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32) / 1024


@pytest.mark.parametrize("keep", [0.04, 0.05, 0.26, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_exactly_k_of_each_tensor_are_largest(keep, variant):
    """Against a stable sort of each expert of each layer; k = 0 is nothing in the paper, everything in the code."""
    x = rounded((3, 2, 4, 5))
    settings = omo(method="onties", keep=keep, variant=variant)
    got = jax.jit(lambda xs: online_merging._largest(settings, STACKED, xs))({"w": x})
    got = np.asarray(got["w"]).reshape(6, 20)
    k = int(keep * 20)
    for row, all_of_it in zip(got, x.reshape(6, 20), strict=True):
        want = all_of_it.copy()
        if k or variant == "paper":
            want[np.argsort(-np.abs(all_of_it), kind="stable")[k:]] = 0
        np.testing.assert_array_equal(row, want)


def test_rescaling_keeps_the_sum_of_magnitudes_of_each_tensor():
    rng = np.random.default_rng(1)
    d, tau = ({"w": jnp.asarray(rng.normal(size=(3, 2, 4, 5)) * s, jnp.float32)} for s in (1e-3, 1e-2))
    sums = lambda tree: np.abs(np.asarray(tree["w"], np.float64)).reshape(6, -1).sum(1)
    for method in ("ondare", "onties"):
        got, _ = one_step(
            omo(method=method, variant="code", rescale=True, alpha=0.0), STACKED, d, jax.tree.map(jnp.zeros_like, tau)
        )
        np.testing.assert_allclose(sums(got), sums(d), rtol=1e-4 if method == "ondare" else 1e-6)  # eps is 1e-8 of 2e-2
        assert 0.2 < float((got["w"] == 0).mean()) < 0.8
    ties = omo(method="onties", variant="code", rescale=True)
    made = online_merging.task_vector(ties, STACKED, tau, jax.tree.map(jnp.zeros_like, tau), seed=0)
    np.testing.assert_allclose(sums(made), sums(tau), rtol=1e-6)


def test_the_paper_draws_the_task_vectors_mask_each_step_and_the_code_once():
    n, keep = 4000, 0.25
    specs, d = {"w": vector(n)}, {"w": jnp.zeros(n)}
    moved = {}
    for variant in ("paper", "code"):
        settings = omo(keep=keep, alpha=0.5, variant=variant)
        tx = online_merging.online_merging(settings, specs, lambda count: 0.0, decay=0.0, eps=1e-8, seed=3)
        tau = online_merging.task_vector(settings, specs, {"w": jnp.full(n, 0.5)}, d, seed=3)
        state, params = online_merging.with_tau(tx.init(d), tau), d
        for _ in range(2):
            updates, state = tx.update(d, state, params)
            params = optax.apply_updates(params, updates)
        moved[variant] = np.asarray(params["w"])
    sigma = np.sqrt(keep * (1 - keep) / n)
    assert set(moved["paper"]) == {0.0, 0.25, 0.5}  # alpha * tau in none, one or both of the steps
    assert moved["paper"].mean() / 0.5 == pytest.approx(keep, abs=5 * sigma)
    assert set(moved["code"]) == {0.0, 1.0}  # 0.5 / 0.25 is bounded by 1, times alpha, twice or never
    assert moved["code"].mean() == pytest.approx(keep, abs=5 * sigma)


def masks(settings, spec, steps=2, seed=0):
    """The masks of d in the first steps."""
    keys = (jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1 + t), 0) for t in range(steps))
    return [np.asarray(online_merging._drawn(settings, spec, key)) for key in keys]


def test_masks_differ_in_all_but_how_layers_are_stored():
    settings = omo(keep=0.1)
    stacked = vector(9, shape=(3, 40, 50), hf_shape=(40, 50), layers=(4, 7, 9))
    first, second = masks(settings, stacked)
    one = vector(9, shape=(1, 40, 50), hf_shape=(40, 50), layers=(7,))
    np.testing.assert_array_equal(masks(settings, one, 1)[0][0], first[1])
    others = [
        second,
        masks(settings, stacked, 1, seed=1)[0],
        masks(settings, dataclasses.replace(stacked, hf="v"), 1)[0],
    ]
    for a, b in [(first, other) for other in others] + [(first[0], first[1])]:
        assert a.mean() == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / a.size))
        assert (a & b).mean() == pytest.approx(0.01, abs=5 * np.sqrt(0.0099 / a.size))  # independent


def reference(settings, theta, tau, increments, kept, kept_tau, rate, decay):
    """Steps in float64 numpy, written from the definition. kept, kept_tau: masks by step, as OnDARE draws them."""
    paper, p, alpha, n = settings.variant == "paper", settings.keep, settings.alpha, theta.size

    def largest(x):
        out = np.zeros_like(x)
        best = sorted(range(n), key=lambda i: -abs(x[i]))[: int(p * n)]
        out[best] = x[best]
        return out

    cached = np.zeros(n)
    for t, d in enumerate(increments, start=1):
        old = theta.copy()
        if t % settings.every:
            cached += d
            theta = theta + d
        else:
            theta, d = theta - cached, cached + d
            cached = np.zeros(n)
            if settings.method == "ondare":
                f = np.where(kept[t - 1], d, 0) / (1 if paper else p)
                f_tau = (
                    np.where(kept_tau[t - 1], tau, 0) if paper else np.clip(np.where(kept_tau[0], tau, 0) / p, -1, 1)
                )
                theta = theta + (1 - alpha) * f + alpha * f_tau
            else:
                f, f_tau = largest(d), largest(tau)
                for i in range(n):
                    x, y = (1 - alpha) * f[i], alpha * f_tau[i]
                    if paper:
                        theta[i] += x + y if x * y >= 0 else max(x, y, key=abs)
                    else:
                        sign = 1 if f[i] + f_tau[i] >= 0 else -1
                        theta[i] += (x if f[i] * sign > 0 else 0) + (y if f_tau[i] * sign > 0 else 0)
        theta = theta - rate * decay * (old if paper else theta)
    return theta


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_steps_equal_the_definition(method, variant, every):
    """Seven steps of two tensors, of which the second is a norm: it does not decay, and merges all the same."""
    settings = omo(method=method, variant=variant, every=every, keep=0.4, alpha=0.1)
    specs = {"a": vector(30), "norm": vector(12, hf="norm", decay=False)}
    rng = np.random.default_rng(2)
    draw = lambda scale: {name: rng.normal(size=spec.shape) * scale for name, spec in specs.items()}
    theta, tau, increments = draw(1.0), draw(0.2), [draw(0.1) for _ in range(7)]
    with jax.enable_x64(True):
        tx = online_merging.online_merging(settings, specs, lambda count: 0.5, decay=0.1, eps=1e-8, seed=5)
        base = jax.tree.map(np.subtract, theta, tau)
        state = online_merging.with_tau(
            tx.init(theta), online_merging.task_vector(settings, specs, theta, base, seed=5)
        )
        params, update = theta, jax.jit(tx.update)
        for d in increments:
            updates, state = update(d, state, params)
            params = optax.apply_updates(params, updates)
    for name, spec in specs.items():

        def drawn(*fold, spec=spec):
            return np.asarray(
                online_merging._drawn(settings, spec, functools.reduce(jax.random.fold_in, fold, jax.random.key(5)))
            )

        kept = [drawn(t, 0) for t in range(1, 8)]
        kept_tau = [drawn(t, 1) for t in range(1, 8)] if variant == "paper" else [drawn(0)]
        ds = [d[name] for d in increments]
        want = reference(settings, theta[name], tau[name], ds, kept, kept_tau, 0.5, 0.1 if spec.decay else 0.0)
        np.testing.assert_allclose(params[name], want, rtol=0, atol=1e-14)


def test_a_ten_billionth_arrives_a_thousand_times():
    """alpha * tau is a twentieth of the distance between the weight and its neighbours in float32."""
    settings, specs = omo(alpha=1e-7, keep=1.0), {"w": vector(3)}
    start = jnp.asarray([0.02, -0.02, 3.0], jnp.float32)
    tx = optimizer.make(Optim(**PLAIN | {"lr": 0.0}, merging=settings), specs, 10)
    tau = jnp.asarray([1e-3, 1e-3, -1e-3], jnp.float32)
    assert (start + 1e-7 * tau == start).all()

    @jax.jit
    def run(params, state):
        def one(carry, _):
            params, state = carry
            updates, state = tx.update({"w": jnp.ones(3)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, state), length=1000)[0]

    params, state = run({"w": start}, online_merging.with_tau(tx.init({"w": start}), {"w": tau}))
    weights, carry = np.float64(params["w"]), np.float64(state[-1].carry["w"])
    want = np.float64(start) + 1000 * np.float64(np.float32(1e-7) * tau)
    most = np.spacing(np.abs(np.asarray(params["w"]))) / 2  # what cannot be in the weights
    assert (np.abs(carry) <= most).all()
    assert (np.abs(weights + carry - want) <= 1000 * most * 2.0**-24).all()  # the carry is float32 as well


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_sums_are_exact(variant):
    """Compiled with Adam, decay and merging around it: weights and carry together lose nothing of any update."""
    settings, specs = omo(variant=variant, alpha=1e-6), {"w": vector(5000)}
    tx = optimizer.make(Optim(**PLAIN | {"decay": 0.1, "lr": 1e-6}, merging=settings), specs, 10)
    rng = np.random.default_rng(4)
    # Also weights smaller than their updates.
    params = {"w": jnp.asarray(rng.normal(size=5000) * 10.0 ** rng.integers(-9, 0, 5000), jnp.float32)}
    state = online_merging.with_tau(tx.init(params), {"w": jnp.asarray(rng.normal(size=5000) * 1e-3, jnp.float32)})

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    for _ in range(5):
        updates, state, new = update({"w": jnp.asarray(rng.normal(size=5000), jnp.float32)}, state, params)
        sums = [np.float64(a["w"]) + np.float64(b["w"]) for a, b in ((params, updates), (new, state[-1].carry))]
        np.testing.assert_array_equal(*sums)
        params = new


ON_EIGHT = """
import dataclasses
import jax, numpy as np
from qwen2_jax.weights import params
from qwen2_jax.parallel import sharding
from qwen2_jax.train import OnlineMerging, Optim, Start, step
from qwen2_jax.train.optim import online_merging as merging
from test_step import RUN
from tiny import CONFIGS, random_params

sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 128, "num_experts": 4}
config = dataclasses.replace(CONFIGS["moe"], **sizes)
merge = OnlineMerging(base="none", keep=0.3, alpha=0.5)
optim = Optim(lr=1e-2, schedule="constant", merging=merge)
run = dataclasses.replace(RUN, optim=optim, model=None, start=Start(checkpoint="none"), rows=8)
meshes = (None, sharding.make_mesh(data=1, fsdp=2, tensor=2, expert=2))
trainers = [step.Trainer(run, config, 20, mesh=mesh) for mesh in meshes]
names = ("embed_VD", "wq_NHD", "bq_NH", "gate_EFD")
specs = {path: spec for path, spec in params.leaves(trainers[0].specs) if path[-1] in names}
ours = trainers[1].shardings.optimizer[-1]
assert ours.tau == ours.carry == trainers[1].shardings.params
for method, variant in (("ondare", "paper"), ("ondare", "code"), ("onties", "code")):
    settings = dataclasses.replace(merge, method=method, variant=variant)
    tx = merging.online_merging(settings, specs, lambda n: 0.01, decay=0.1, eps=1e-8, seed=7)

    def both(sft, base, d):
        tau = merging.task_vector(settings, specs, sft, base, seed=7)
        return tau, *tx.update(d, merging.with_tau(tx.init(sft), tau), sft)

    found = []
    for trainer in trainers:
        some = lambda tree: {path: x for path, x in params.leaves(tree) if path in specs}
        places = some(jax.tree.map(lambda x: x.sharding, trainer.abstract.params))
        trees = (jax.device_put(some(random_params(config, seed=s)), places) for s in (0, 1, 2))
        found.append(jax.tree.map(np.asarray, jax.jit(both)(*trees)))
    for (path, a), b in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    print("equal")
"""


@pytest.mark.slow
def test_a_mesh_changes_no_bit():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "train")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"] * 3


MODEL = ModelConfig(
    vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory, corpus):
    """Folders of a base model and of what was made of it."""
    folder = tmp_path_factory.mktemp("stages")
    base, difference = (random_params(MODEL, seed=seed) for seed in (0, 1))
    sft = jax.tree.map(lambda b, d: b + 0.01 * d, base, difference)
    for name, params in (("base", base), ("sft", sft)):
        checkpoint.save_hf(folder / name, MODEL, params, tokenizer_files_from=None)
    return folder


def run_of(stages, corpus, out, **changes):
    merge = OnlineMerging(base=str(stages / "base"), keep=0.5, alpha=1e-4, every=2)
    return Pretrain(
        **{
            "start": Start(checkpoint=str(stages / "sft")),
            "tokenizer": str(corpus / "tokenizer"),
            "data": Data(sources=(Source(path=str(corpus / "text.jsonl")),)),
            "rows": 4,
            "length": 32,
            "steps": 6,
            "optim": Optim(lr=1e-3, schedule="constant", merging=merge),
            "dtype": "float32",
            "export_dtype": "float32",
            "remat": None,
            "checkpoints": Checkpointing(every_steps=3),
            "out": out,
        }
        | changes
    )


@pytest.fixture(scope="module")
def trainer(stages, corpus):
    """Compiled once for all runs here, which differ in their folders and in when they end."""
    made = step.Trainer(run_of(stages, corpus, Path("out")), MODEL, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", lambda *_, **__: made)
        yield made


@pytest.mark.slow  # quick: a run stops and goes on in test_loop.py
def test_a_run_resumes_bit_for_bit_with_its_task_vector(stages, corpus, trainer, tmp_path):
    """Stopped after step 3, between two merges; the base model is gone when it goes on."""
    console = Console(file=io.StringIO())
    whole = run_of(stages, corpus, tmp_path / "whole")
    loop.run(whole, console)
    moved = tmp_path / "stages"
    for name in ("base", "sft"):
        checkpoint.convert(stages / name, moved / name, "hf")
    first = run_of(moved, corpus, tmp_path / "parts", steps=3)
    loop.run(first, console)
    for file in (moved / "base").iterdir():
        file.unlink()
    (moved / "base").rmdir()
    loop.run(dataclasses.replace(first, steps=6), console)
    states = []
    for run in (whole, first):
        job = loop.prepare(run, console)
        with Checkpoints(run.out / "checkpoints", run.checkpoints, identity=job.identity, console=console) as saved:
            states.append(saved.restore(trainer.abstract).state)
    for (path, a), b in zip(jax.tree.leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    ours = states[0].optimizer[-1]
    sft, base = (checkpoint.load_params(stages / name, MODEL, dtype="float32") for name in ("sft", "base"))
    for got, a, b in zip(*map(jax.tree.leaves, (ours.tau, sft, base)), strict=True):
        np.testing.assert_array_equal(got, a - b)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(ours.carry))


@pytest.mark.slow  # quick: other settings are refused in test_loop.py
@pytest.mark.usefixtures("trainer")
def test_what_is_kept_of_the_task_vector_cannot_change_in_a_run(stages, corpus, tmp_path):
    console = Console(file=io.StringIO())
    run = run_of(stages, corpus, tmp_path / "run", steps=1)
    loop.run(run, console)
    changed = dataclasses.replace(run.optim.merging, keep=0.25)
    with pytest.raises(UserError, match=r"optim.merging.keep: 0.5 -> 0.25"):
        loop.run(dataclasses.replace(run, steps=2, optim=dataclasses.replace(run.optim, merging=changed)), console)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"alpha": -1e-7}, "alpha is -1e-07"),
        ({"every": 0}, "every is 0"),
        ({"method": "ties"}, "supported: 'ondare', 'onties'"),
        ({"variant": "report"}, "supported: 'paper', 'code'"),
        ({"rescale": True}, "variant 'code' only"),
    ],
)
def test_settings_are_checked(fields, says):
    with pytest.raises(UserError, match=says):
        omo(**fields)


def test_what_merging_does_not_go_with(stages, corpus, tmp_path):
    with pytest.raises(UserError, match="algorithm 'adamw'"):
        Optim(lr=1.0, algorithm="adafactor", merging=omo())
    with pytest.raises(UserError, match="no lora"):
        run_of(stages, corpus, tmp_path, lora=Lora(), lora_base="float32")
    with pytest.raises(UserError, match="give start instead of model"):
        run_of(stages, corpus, tmp_path, start=None, model=MODEL)
