# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: what they compute, what is differentiated, where they live, and what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import tiny
from few import slow
from qwen2_jax import PRESETS, model
from qwen2_jax.errors import UserError
from qwen2_jax.model import lora
from qwen2_jax.model.lora import Lora
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.adapted import Adapted
from qwen2_jax.weights.int8 import Int8, quantize
from qwen2_jax.weights.params import count, leaves
from qwen2_jax.weights.plain import MANY_ROWS
from qwen2_jax.weights.weight import dequantize, matmul
from tolerance import assert_no_worse, close

MIXED = dataclasses.replace(tiny.CONFIGS["moe_mixed"], num_hidden_layers=4)  # two repeats of a dense and a sparse layer
SPARSE = dataclasses.replace(tiny.CONFIGS["moe"], num_hidden_layers=1)
DENSE = dataclasses.replace(tiny.CONFIGS["dense"], num_hidden_layers=2)
RANK4 = Lora(rank=4, alpha=6.0)
IDS = jnp.asarray(np.random.default_rng(5).integers(0, 96, (2, 11)), jnp.int32)


def random_adapters(config, settings=RANK4, *, unroll=False):
    """Adapters as after some training: b is not zero. The same values stacked and unrolled."""

    def values(spec):
        one = lambda layer: np.random.default_rng([layer, len(spec.hf)]).normal(size=spec.shape[1:]) * 0.1
        return jnp.asarray(np.stack([one(layer) for layer in spec.layers]), jnp.float32)

    return jax.tree.map(values, lora.declare(config, settings, unroll=unroll))


@functools.cache
def logits_of(config, unroll=False):
    """A compiled function from parameters, in whatever form, to logits."""
    graphdef = model.declare(config, unroll=unroll)[0]
    return jax.jit(lambda params: (qwen2 := nnx.merge(graphdef, params)).logits(qwen2(IDS).hidden_BTD))


@functools.cache
def gradient_of(config):
    """A compiled function from (adapters, parameters) to the gradient of a loss with respect to the adapters."""
    loss = lambda adapters, params: jnp.square(logits_of(config)(lora.attach(params, adapters, RANK4))).mean()
    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(("config", "unroll"), slow((MIXED, False), (SPARSE, True)), ids=["stacked", "unrolled"])
def test_attached_is_merged_and_fresh_adapters_change_nothing(config, unroll):
    params, logits = tiny.random_params(config, unroll=unroll), logits_of(config, unroll)
    base = np.asarray(logits(params))
    fresh = jax.jit(lambda: lora.init(config, RANK4, jax.random.key(0), unroll=unroll))()
    np.testing.assert_array_equal(logits(lora.attach(params, fresh, RANK4)), base)
    trained = random_adapters(config, unroll=unroll)
    merged = np.asarray(logits(lora.merge(params, trained, RANK4)))
    close(logits(lora.attach(params, trained, RANK4)), merged, units=80)  # W + b a rounds every weight: 29 was seen
    assert np.abs(merged - base).max() > 0.1 * np.abs(base).max()


@pytest.mark.parametrize("target", [*Lora().targets, "mlp.gate_proj", "shared_expert.up_proj"])
def test_every_target_changes_its_own_weights_as_the_formula_says(target):
    """merge against W + scale b a spelled out in the file's shapes, and nothing else touched."""
    settings = Lora(rank=4, alpha=6.0, targets=(target,), rslora=True)
    params, adapters = tiny.random_params(MIXED), random_adapters(MIXED, settings)
    specs = dict(leaves(model.declare(MIXED)[1]))
    before, after, low = (dict(leaves(tree)) for tree in (params, lora.merge(params, adapters, settings), adapters))
    changed = {path for path in before if after[path] is not before[path]}
    assert changed == {path for path in before if (*path, "a") in low} != set()
    for path in changed:
        spec = specs[path]
        assert f".{spec.hf}".endswith(f".{target}.weight") and "experts" not in spec.axes
        for r in range(len(spec.layers)):
            a, b = (np.asarray(low[(*path, x)][r], np.float64) for x in "ab")
            want = b.reshape(-1, 4) @ a.reshape(4, -1) * (6 / 2)
            got = np.asarray(after[path][r]).reshape(spec.hf_shape) - np.asarray(before[path][r]).reshape(spec.hf_shape)
            close(got, want, units=2)  # a weight below 1 is rounded twice: 0.6 was seen


@pytest.mark.parametrize("rows", [1, 5, MANY_ROWS])
@pytest.mark.parametrize("contract", [1, 2])
def test_a_bfloat16_product_is_as_good_as_plain_code(rows, contract):
    rng = np.random.default_rng(0)
    inputs, outputs = (24, 2)[:contract], (5, 3)[contract - 1 :]
    x, base = rng.normal(size=(rows, *inputs)), rng.normal(size=(*outputs, *inputs))
    a, b = rng.normal(size=(4, *inputs)), rng.normal(size=(*outputs, 4))
    w = Adapted(jnp.asarray(base, jnp.bfloat16), jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 0.5)
    got = jax.jit(lambda x, w: matmul(x, w, contract=contract))(jnp.asarray(x, jnp.bfloat16), w)
    assert got.dtype == jnp.bfloat16 and got.shape == (rows, *outputs)

    rounded = [jnp.asarray(m, jnp.bfloat16).reshape(n, -1) for m, n in ((x, rows), (base, math.prod(outputs)), (a, 4))]
    rounded.append(jnp.asarray(b, jnp.bfloat16).reshape(-1, 4))
    plain = lambda x_MK, w_FK, a_rK, b_Fr: (x_MK @ w_FK.T + (x_MK @ a_rK.T) @ b_Fr.T / 2).reshape(got.shape)
    assert_no_worse(got, plain(*rounded), plain(*(np.asarray(m, np.float64) for m in rounded)))


def test_gradients_of_the_adapters_are_those_through_the_merged_weights():
    """With W = base + scale b a: dL/da = scale b^T dL/dW and dL/db = scale dL/dW a^T, for each layer."""
    params, adapters = tiny.random_params(DENSE), random_adapters(DENSE)
    got = dict(leaves(gradient_of(DENSE)(adapters, params)))
    loss = jax.jit(jax.grad(lambda params: jnp.square(logits_of(DENSE)(params)).mean()))
    of_weights = dict(leaves(loss(lora.merge(params, adapters, RANK4))))
    low, specs = dict(leaves(adapters)), dict(leaves(lora.declare(DENSE, RANK4)))
    for path in {path[:-1] for path in low}:
        R, rank, inputs = len(low[*path, "a"]), RANK4.rank, specs[*path, "a"].hf_shape[1]
        a, b = np.asarray(low[*path, "a"]).reshape(R, rank, inputs), np.asarray(low[*path, "b"]).reshape(R, -1, rank)
        dw = np.asarray(of_weights[path]).reshape(R, -1, inputs)
        for name, want in (("a", b.mT @ dw), ("b", dw @ a.mT)):
            g, want = got[*path, name], want * RANK4.scale
            assert g.dtype == jnp.float32 and np.abs(want).max() > 0, path
            scale = np.abs(want).max()  # float32 sums in two orders: 6e-6 of it was seen
            np.testing.assert_allclose(np.ravel(g), np.ravel(want), atol=2e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("rows", [3, MANY_ROWS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_passes_the_gradient_to_its_input(rows, dtype):
    """On CPU few rows go through a rounding of x, whose own slope is zero."""
    rng = np.random.default_rng(0)
    w = Int8(jnp.asarray(rng.integers(-127, 128, (3, 2, 8)), jnp.int8), jnp.asarray(rng.random((3, 2)), jnp.float32))
    x, dy = jnp.asarray(rng.normal(size=(rows, 8)), dtype), rng.normal(size=(rows, 3, 2))
    got = jax.jit(jax.grad(lambda x: jnp.sum(matmul(x, w, dtype=jnp.float32) * dy)))(x)
    assert got.dtype == dtype
    full = np.asarray(w.values, np.float64) * np.asarray(w.scale)[..., None]
    exact = np.tensordot(dy, full, 2)
    naive = jnp.tensordot(jnp.asarray(dy, dtype), jnp.asarray(full, dtype), 2)
    assert_no_worse(got, naive, exact)


@pytest.mark.slow  # each product above
def test_training_on_an_int8_base_has_the_gradients_of_the_rounded_weights():
    rounded = quantize(tiny.random_params(DENSE), model.declare(DENSE)[1])
    widened = jax.tree.map(dequantize, rounded, is_leaf=lambda x: isinstance(x, Int8))
    got, want = (jax.tree.leaves(gradient_of(DENSE)(random_adapters(DENSE), base)) for base in (rounded, widened))
    norm = lambda xs: math.sqrt(sum(float(jnp.sum(x * x)) for x in xs))
    assert norm([g - w for g, w in zip(got, want, strict=True)]) < 0.01 * norm(
        want
    )  # x in 15 bits; a lost path costs 1


def test_no_work_and_no_memory_for_the_frozen_weight():
    """Neither W + b a nor a gradient of W: small temporaries, wide products forwards and towards the input alone."""
    M, D = 32, 1024
    bytes_of_weight, wide = D * D * 4, 2 * M * D * D
    x_MD, a, b, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, D), (4, D), (D, 4), (D, D)))

    def loss(trained, bases, x_MD):
        for base, (a, b) in zip(bases, trained, strict=True):
            x_MD = jnp.tanh(matmul(x_MD, Adapted(base, a, b, 2.0)))
        return x_MD.sum()

    def compiled(base):
        return jax.jit(jax.grad(loss)).lower([(a, b)] * 2, [base] * 2, x_MD).compile()

    program = compiled(w)
    assert 3 * wide <= program.cost_analysis()["flops"] < 3.3 * wide  # twice forwards, once back
    assert program.memory_analysis().temp_size_in_bytes < bytes_of_weight / 4
    int8 = Int8(jax.ShapeDtypeStruct((D, D), jnp.int8), jax.ShapeDtypeStruct((D,), jnp.float32))
    assert compiled(int8).memory_analysis().temp_size_in_bytes < 1.25 * bytes_of_weight  # XLA:CPU widens one to float32


def test_init_depends_on_key_name_and_layer_alone():
    settings = Lora(rank=4, targets=("q_proj", "o_proj", "down_proj"))
    make = jax.jit(lambda: [lora.init(DENSE, settings, jax.random.key(3), unroll=unroll) for unroll in (False, True)])
    stacked, apart = (dict(leaves(tree)) for tree in make())
    seen = set()
    for path, spec in leaves(lora.declare(DENSE, settings)):
        value = np.asarray(stacked[path])
        assert value.shape == spec.shape and value.dtype == spec.dtype == np.float32
        for r, layer in enumerate(spec.layers):
            np.testing.assert_array_equal(value[r], apart["stacks", layer, "blocks", 0, *path[4:]][0])
        if path[-1] == "b":
            assert not value.any()
            continue
        bound = 1 / math.sqrt(spec.hf_shape[1])
        assert 0.9 * bound < np.abs(value).max() <= bound and abs(value.mean()) < 0.2 * bound
        mine = {layer.tobytes() for layer in value}
        assert not seen & mine and len(mine) == len(spec.layers)  # no two weights begin alike
        seen |= mine


@pytest.mark.parametrize("name", ["qwen2-72b", "qwen2-57b-a14b"])
def test_declarations_serve_sharding_and_counting(name):
    config = PRESETS[name]
    specs = lora.declare(config, Lora())
    mesh = AbstractMesh((2, 4, 4), ("fsdp", "tensor", "expert"))
    wanted = dict(leaves(model.declare(config)[1]))
    scalars = 0
    for path, spec in leaves(specs):
        weight = wanted[path[:-1]]
        assert spec.decay and spec.layers == weight.layers
        where = sharding.sharding(spec.axes, spec.shape, mesh).spec
        of_weight = sharding.sharding(weight.axes, weight.shape, mesh).spec
        split = len(weight.shape) - (2 if "wo_DNH" in path else 1)
        kept = of_weight[1:split] if path[-1] == "b" else of_weight[split:]
        assert tuple(where) == ((None, *kept, None) if path[-1] == "b" else (None, None, *kept))
        scalars += len(spec.layers) * 16 * weight.hf_shape[0 if path[-1] == "b" else 1]
    assert count(specs) == scalars


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(UserError, match=r"'experts.up_proj'.*self_attn.q_proj.*mlp.shared_expert.*routed experts"):
        lora.declare(tiny.CONFIGS["moe"], Lora(targets=("q_proj", "experts.up_proj")))
    for target in ("embed_tokens", "lm_head", "input_layernorm", "proj", "gate"):
        with pytest.raises(UserError, match=f"'{target}'; this model can adapt self_attn.k_proj"):
            lora.declare(tiny.CONFIGS["untied"], Lora(targets=(target,)))
    config = tiny.CONFIGS["dense"]
    params, adapters = tiny.random_params(config), random_adapters(config)
    with pytest.raises(ValueError, match="does not fit"):
        lora.attach(tiny.random_params(config, unroll=True), adapters, RANK4)
    with pytest.raises(ValueError, match="one of them stacked, one unrolled"):
        lora.attach(params, random_adapters(config, unroll=True), RANK4)
    with pytest.raises(ValueError, match="does not fit"):
        lora.attach(params, adapters, Lora(rank=5))
    rounded = quantize(params, model.declare(config)[1])
    with pytest.raises(UserError, match="int8"):
        lora.merge(rounded, adapters, RANK4)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"alpha": float("nan")}, {"targets": ()}, {"targets": ("q", 1)}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(UserError, match=f"lora: {next(iter(wrong))} is"):
        Lora(**wrong)


def test_adapters_stay_when_the_base_is_quantized():
    config = tiny.CONFIGS["dense"]
    attached = lora.attach(tiny.random_params(config), adapters := random_adapters(config), RANK4)
    late = quantize(attached, specs := model.declare(config)[1])
    early = lora.attach(quantize(tiny.random_params(config), specs), adapters, RANK4)
    assert jax.tree.structure(late) == jax.tree.structure(early)
    jax.tree.map(np.testing.assert_array_equal, late, early)
