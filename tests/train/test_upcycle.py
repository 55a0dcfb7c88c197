# SPDX-License-Identifier: Apache-2.0
"""Upcycling: what is copied, what is drawn, and how much of the dense layer's function is left."""

import dataclasses
import functools
import io
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import tiny
from qwen2_jax import PRESETS, checkpoint, model
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.train import Upcycle, recipes
from qwen2_jax.train.upcycle.upcycle import Upcycling, report, sparse_config, upcycle, write
from qwen2_jax.weights import params
from tolerance import close

DENSE = tiny.CONFIGS["dense"]  # width 48, 64 neurons, 3 layers
# 8 experts of 24: three whole copies of 64, nothing left over, experts span copies.
OPTIONS = Upcycling(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=80,
    reinitialise=0.0,
)
PRESERVE = dataclasses.replace(OPTIONS, scale="preserve", router_init="zeros", shared_init="copies")


@functools.cache
def dense():
    return tiny.random_params(DENSE)


@functools.cache
def made(options, layer=1):
    """(dense mlp, its moe) of one layer in float64."""
    block = upcycle(DENSE, dense(), options)[1]["stacks"][0]["blocks"][0]
    mlp = dense()["stacks"][0]["blocks"][0]["mlp"]
    return jax.tree.map(lambda p: np.asarray(p[layer], np.float64), (mlp, block["moe"]))


def swiglu(x, gate, up, down):
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def ffn(mlp, x):
    return swiglu(x, mlp["gate_FD"], mlp["up_FD"], mlp["down_DF"])


def experts(moe, x):
    return [swiglu(x, *weights) for weights in zip(moe["gate_EFD"], moe["up_EFD"], moe["down_EDF"], strict=True)]


X = np.random.default_rng(0).normal(size=DENSE.hidden_size)


def test_numbers_of_57b():
    sizes = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560}
    options = Upcycling(**sizes, shared_expert_intermediate_size=20480)
    assert (options.copies(18944), options.dropped(18944), options.redrawn()) == (9, 6656, 1280)
    want = dataclasses.replace(PRESETS["qwen2-57b-a14b"], vocab_size=152064)  # the two differ in padding there
    assert sparse_config(PRESETS["qwen2-7b"], options) == want


def test_windows_stay():
    """Qwen2 and Qwen2-MoE have different layers sliding by default."""
    config = tiny.CONFIGS["sliding"]
    assert sparse_config(config, OPTIONS).windows == config.windows


def test_a_shuffled_copy_computes_the_same():
    mlp, moe = made(OPTIONS)
    gate, up = (moe[name].reshape(-1, 48) for name in ("gate_EFD", "up_EFD"))
    down = moe["down_EDF"].swapaxes(0, 1).reshape(48, -1)
    want, orders = ffn(mlp, X), []
    for copy in range(3):
        at = slice(64 * copy, 64 * copy + 64)
        np.testing.assert_allclose(swiglu(X, gate[at], up[at], down[:, at]), want, rtol=1e-14, atol=1e-14)  # float64
        orders.append([int(np.flatnonzero((mlp["gate_FD"] == row).all(1))[0]) for row in gate[at]])
        assert sorted(orders[-1]) == list(range(64))
    assert orders[0] != orders[1] != orders[2] != list(range(64))
    np.testing.assert_allclose(sum(experts(moe, X)), 3 * want, rtol=1e-14, atol=1e-14)  # float64


def test_a_wider_shared_expert_computes_the_same():
    for options in (OPTIONS, dataclasses.replace(PRESERVE, scale="none")):
        mlp, moe = made(options)
        # Halves of float32 weights are exact, and the sums are in float64: 2e-15 of 11 was seen.
        np.testing.assert_allclose(ffn(moe["shared"], X), ffn(mlp, X), rtol=1e-14, atol=1e-14)
        assert not moe["shared_gate_D"].any()
    assert moe["shared"]["gate_FD"][64:].tolist() == mlp["gate_FD"][:16].tolist()


def test_exactly_half_of_each_experts_neurons_is_drawn():
    _, old = made(OPTIONS)
    _, new = made(dataclasses.replace(OPTIONS, reinitialise=0.5, std=0.5))
    same = {
        "gate": (old["gate_EFD"] == new["gate_EFD"]),
        "up": (old["up_EFD"] == new["up_EFD"]),
        "down": (old["down_EDF"] == new["down_EDF"]).swapaxes(1, 2),
    }
    kept = same["gate"].all(-1)
    assert (kept.sum(axis=1) == 12).all()
    assert len({tuple(row) for row in kept}) > 1  # not the same places in every expert
    for name, equal in same.items():
        assert (equal.all(-1) == kept).all(), name
        assert not equal[~kept].any(), name
    fresh = np.concatenate([new["gate_EFD"][~kept], new["up_EFD"][~kept], new["down_EDF"].swapaxes(1, 2)[~kept]])
    assert fresh.std() == pytest.approx(0.5, rel=5 / np.sqrt(2 * fresh.size))
    assert len(np.unique(fresh)) > 0.99 * fresh.size  # experts and matrices draw different numbers
    assert new["router_ED"].std() == pytest.approx(0.5, rel=5 / np.sqrt(2 * new["router_ED"].size))


def test_single_weights_can_be_drawn():
    _, old = made(OPTIONS)
    _, new = made(dataclasses.replace(OPTIONS, reinitialise=0.25, granularity="element"))
    for name in ("gate_EFD", "up_EFD", "down_EDF"):
        changed = (old[name] != new[name]).mean(axis=(1, 2))
        np.testing.assert_allclose(changed, 0.25, atol=5 * np.sqrt(0.1875 / old[name][0].size))


def test_preserve_is_exact_on_average_over_all_choices_of_experts():
    share = dataclasses.replace(PRESERVE, routed_share=0.7, norm_topk_prob=True)
    for options, weight in ((PRESERVE, 1 / 8), (share, 1 / 2)):
        mlp, moe = made(options)
        outputs = experts(moe, X)
        chosen = [weight * (outputs[a] + outputs[b]) for a, b in itertools.combinations(range(8), 2)]
        got = np.mean(chosen, axis=0) + ffn(moe["shared"], X) / 2
        close(got, ffn(mlp, X), units=1)  # weights scaled and rounded in float32: 0.3 was seen


@pytest.mark.slow
def test_preserve_counts_the_weight_a_random_router_gives():
    """With a random shared expert all is supplied by the routed ones: factor times h/F times the weight makes 1."""
    options = dataclasses.replace(OPTIONS, scale="preserve", shared_init="random")
    _, plain = made(dataclasses.replace(options, scale="none"))
    _, moe = made(options)
    factor = np.median(moe["down_EDF"] / plain["down_EDF"])
    x = np.random.default_rng(1).normal(size=(20000, 48))  # the norm's weights are ones
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    router = np.random.default_rng(2).normal(size=(20000, 8, 48)) * DENSE.initializer_range
    p = np.exp(np.einsum("med,md->me", router, x))
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    weight = p[:, -2:].sum(axis=1).mean()
    assert weight > 0.5  # 1/4 if it were uniform
    assert factor * weight * 24 / 64 == pytest.approx(1, rel=0.02)  # a mean over 4,096 draws: 0.002 was seen


def test_unrolled_parameters_give_the_same():
    stacked = model.unroll(upcycle(DENSE, dense(), OPTIONS)[1], sparse_config(DENSE, OPTIONS))
    unrolled = upcycle(DENSE, model.unroll(dense(), DENSE), OPTIONS)[1]
    jax.tree.map(np.testing.assert_array_equal, stacked, unrolled)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(dense folder, sparse folder, options, report)"""
    root = tmp_path_factory.mktemp("upcycle")
    options = dataclasses.replace(OPTIONS, reinitialise=0.5)
    checkpoint.save_hf(root / "dense", DENSE, dense())
    (root / "dense" / "generation_config.json").write_text('{"temperature": 0.7}')
    return root / "dense", root / "moe", options, write(root / "dense", root / "moe", options)


def test_folder_is_what_upcycle_returns(folders):
    _, folder, options, _ = folders
    config, want = upcycle(DENSE, dense(), options)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2MoeForCausalLM"]
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.7}
    assert checkpoint.read_config(checkpoint.locate(folder)) == config
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(folder), want)
    specs = dict(params.leaves(model.declare(config)[1]))
    assert {path: leaf.shape for path, leaf in params.leaves(want)} == {p: spec.shape for p, spec in specs.items()}


@pytest.mark.slow  # the report is written and read below
def test_report_measures_the_models_themselves(folders):
    *_, options, _ = folders
    ids = np.random.default_rng(3).integers(0, 96, (2, 12))
    got = report(DENSE, dense(), options, ids)

    def logits(config, weights):
        qwen2 = nnx.merge(model.declare(config)[0], weights)
        return np.asarray(qwen2.logits(qwen2(jnp.asarray(ids)).hidden_BTD), np.float64)

    want = logits(DENSE, dense())
    y = logits(*upcycle(DENSE, dense(), options))
    assert got.after.logits_error == pytest.approx(np.linalg.norm(y - want) / np.linalg.norm(want), rel=1e-6)
    logprobs = y - np.log(np.exp(y).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], -1).mean()
    assert got.after.loss == pytest.approx(nll, rel=1e-6)  # of float32 logits: 1e-7 was seen
    assert len(got.before.layers) == 3
    assert all(0.5 < match.times < 1 for match in got.before.layers)  # half by the shared expert
    assert str(got).count("\n") == 6


def test_the_recipe_plans_makes_once_and_makes_anew(folders, tmp_path):
    """--dry-run writes nothing, the same command again makes nothing, --no-resume replaces; the report is a table."""
    source, _, options, _ = folders
    config = Upcycle(checkpoint=str(source), experts=options, out=tmp_path / "run")

    def told(config):
        console = Console(file=io.StringIO(), width=200)
        return recipes.run(config, console), console.file.getvalue()

    assert told(dataclasses.replace(config, dry_run=True))[0] is None
    assert not (tmp_path / "run").exists()
    folder, screen = told(config)
    assert "times dense" in screen and "parameters become" in screen
    assert "times dense" in (tmp_path / "run" / "report.txt").read_text()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert "exists already; --no-resume makes it again" in told(config)[1]
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    told(dataclasses.replace(config, resume=False))
    assert (folder / "model.safetensors").stat().st_mtime_ns > written


def test_transformers_agrees(folders):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, folder, options, _ = folders
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    ids = np.random.default_rng(3).integers(0, 96, (2, 12))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    config, weights = upcycle(DENSE, dense(), options)
    qwen2 = nnx.merge(model.declare(config)[0], weights)
    # The bar against transformers in float32.
    np.testing.assert_allclose(qwen2.logits(qwen2(jnp.asarray(ids)).hidden_BTD), want, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8"),
        ({"reinitialise": 1.5}, "from 0 to 1"),
        ({"granularity": "row"}, "supported: 'neuron', 'element'"),
        ({"routed_share": 0.5}, "no effect with scale 'none'"),
        ({"routed_share": 0.5, "scale": "preserve", "shared_init": "random"}, "supplies nothing"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OPTIONS, **changes)


def test_sparse_models_are_refused():
    with pytest.raises(UserError, match="5 experts already"):
        sparse_config(tiny.CONFIGS["moe"], OPTIONS)
    assert isinstance(sparse_config(DENSE, OPTIONS), ModelConfig)


SCRIPT = """
import dataclasses, sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
import tiny
from qwen2_jax.model import decoder as model
from qwen2_jax.weights import params
from qwen2_jax.parallel.sharding import make_mesh, sharding
from qwen2_jax.train.upcycle.upcycle import Upcycling, upcycle
config = tiny.CONFIGS["dense"]
options = Upcycling(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=80)
weights = tiny.random_params(config)
sparse, want = upcycle(config, weights, options)
mesh = make_mesh(fsdp=2, tensor=2, expert=2)
place = lambda spec, x: jax.device_put(x, sharding(spec.axes, spec.shape, mesh))
is_spec = lambda x: isinstance(x, params.ParamSpec)
spread = jax.tree.map(place, model.declare(config)[1], weights, is_leaf=is_spec)
got = dict(params.leaves(upcycle(config, spread, options)[1]))
specs = dict(params.leaves(model.declare(sparse)[1]))
for path, x in params.leaves(want):
    spec, y = specs[path], got[path]
    assert y.sharding.is_equivalent_to(sharding(spec.axes, spec.shape, mesh), y.ndim), (path, y.sharding)
    np.testing.assert_array_equal(x, y, err_msg=str(path))
"""


@pytest.mark.slow
def test_eight_devices_give_the_same():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    tests = os.path.dirname(tiny.__file__)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tests], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
