# SPDX-License-Identifier: Apache-2.0
"""Products with weights in every form they are stored in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from few import slow
from qwen2_jax import model, ops
from qwen2_jax.weights import int4_groups, int8
from qwen2_jax.weights.forms import FORMS
from qwen2_jax.weights.int8 import quantize
from qwen2_jax.weights.params import leaves
from qwen2_jax.weights.plain import MANY_ROWS
from qwen2_jax.weights.weight import StoredWeight, convert, dequantize, matmul, of_experts, stored_forms, take
from tolerance import assert_no_worse


@pytest.mark.parametrize("rows", [1, 2, 7, MANY_ROWS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_is_a_product_over_the_last_dimensions(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 4, 6), dtype)
    w = jax.random.normal(jax.random.key(1), (5, 3, 4, 6), dtype)
    want, plain = (np.einsum("mab,ofab->mof", *(np.asarray(a, kind) for a in (x, w))) for kind in ("f8", "f4"))
    got = jax.jit(lambda x, w: matmul(x, w, contract=2, dtype=jnp.float32))(x, w)
    assert got.shape == (rows, 5, 3)
    assert_no_worse(got, plain, want)
    assert matmul(x, w, contract=2).dtype == dtype


@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS])
def test_int8_rounds_the_weight_and_nothing_else(rows):
    w = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    leaf = {"w": jnp.asarray(w)}
    spec = {"w": _spec(("mlp", "embed"))}
    quantized = quantize(leaf, spec)["w"]
    assert leaf == {}
    rounded = np.asarray(quantized.values, np.float64) * np.asarray(quantized.scale)[:, None]
    assert np.abs(rounded - w).max() <= np.abs(w).max(axis=1).max() / 254 + 1e-7
    x = np.random.default_rng(1).normal(size=(rows, 64)).astype(np.float32)
    got = jax.jit(matmul)(jnp.asarray(x), quantized)
    np.testing.assert_allclose(got, x @ rounded.T, atol=2e-3)  # 15 bits of x, 64 terms
    np.testing.assert_array_equal(take(quantized, jnp.array([3]), jnp.float32)[0], rounded[3].astype(np.float32))


def _spec(axes):
    return next(leaf for leaf in jax.tree.leaves(model.declare(tiny.CONFIGS["dense"])[1]) if leaf.axes[1:] == axes)


@pytest.mark.parametrize(
    ("name", "unroll"),
    [
        *(("dense", True), ("moe", False)),
        *slow(("untied", False), ("moe_mixed", False), ("dense", False), ("untied", True), ("moe_mixed", True)),
    ],
)
def test_a_quantized_model_stays_close(name, unroll):
    config = tiny.CONFIGS[name]
    graphdef, specs = model.declare(config, unroll=unroll)
    run = jax.jit(lambda params, ids: (qwen2 := nnx.merge(graphdef, params)).logits(qwen2(ids).hidden_BTD))
    ids = jnp.arange(24).reshape(2, 12)
    exact = np.asarray(run(tiny.random_params(config, unroll=unroll), ids))
    params = quantize(tiny.random_params(config, unroll=unroll), specs)
    assert stored_forms(params) == ("int8",)
    got = np.asarray(run(params, ids))
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(got)
    divergence = (np.exp(p) * (p - q)).sum(-1).mean()
    assert 0 < divergence < 0.02, f"mean KL divergence {divergence:.4f} nats"


def experts_are_their_widened_matrices(rows, matrices, tolerance):
    """Values and the gradient of x of a layer of experts (gate, up, down); returns the bytes of its temporaries."""
    E, _, D = matrices[0].shape
    rng = np.random.default_rng(0)
    x_MD = jnp.asarray(rng.normal(size=(rows, D)), jnp.float32)
    chosen_Mk = jnp.asarray(rng.permuted(np.tile(np.arange(E), (rows, 1)), axis=1)[None, :, :2])
    weights_Mk = jnp.full(chosen_Mk.shape, 0.5)

    def loss(x_MD, matrices):
        y_BTD = ops.experts(x_MD[None], chosen_Mk, weights_Mk, *map(of_experts, matrices))
        return jnp.square(y_BTD).sum(), y_BTD

    program = jax.jit(jax.grad(loss, has_aux=True))
    got, want = program(x_MD, matrices), program(x_MD, [dequantize(w) for w in matrices])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))
    forward = jax.jit(lambda *args: loss(*args)[1]).lower(x_MD, matrices).compile()
    return forward.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [3, *slow(96)])  # expert by expert, and laid out side by side (quick: groups, below)
def test_int8_experts_multiply_as_their_widened_matrices(rows):
    """Nothing like a widened copy of all experts is made."""
    E, D, F = 8, 128, 192
    rng = np.random.default_rng(0)
    shapes = {"gate_EFD": (E, F, D), "up_EFD": (E, F, D), "down_EDF": (E, D, F)}
    rounded = [int8._rounded(jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32), 1) for shape in shapes.values()]
    assert [w.scale.shape for w in rounded] == [(E, F), (E, F), (E, D)]
    assert experts_are_their_widened_matrices(rows, rounded, 1e-4) < E * F * D * 4  # 15 bits of x: 3e-5


def test_int8_covers_routed_experts_and_not_the_router():
    config = tiny.CONFIGS["moe"]
    specs = model.declare(config)[1]
    params = quantize(tiny.random_params(config), specs)
    moe = params["stacks"][0]["blocks"][0]["moe"]
    kinds = {name: stored_forms(moe[name]) for name in ("gate_EFD", "up_EFD", "down_EDF", "router_ED", "shared_gate_D")}
    assert kinds == dict.fromkeys(("gate_EFD", "up_EFD", "down_EDF"), ("int8",)) | {
        "router_ED": (),
        "shared_gate_D": (),
    }
    R, E, F, D = moe["gate_EFD"].shape
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(moe["gate_EFD"])) == R * E * F * (D + 4)


def test_a_frequent_token_s_gradient_is_added_up_in_float32():
    """bfloat16 has 8 bits: a sum of ones in it ends at 256."""
    table, ids = jnp.zeros((3, 2), jnp.bfloat16), jnp.full((4096,), 1)
    gradient = jax.jit(jax.grad(lambda table: take(table, ids, jnp.bfloat16).astype(jnp.float32).sum()))(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[:, 0], [0, 4096, 0])


def grouped(shape, *, inputs=1, group=16, seed=0):
    """(a weight in groups, the weight that it stands for in float32)."""
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    rounded = int4_groups._rounded(w, inputs, group)
    return rounded, np.asarray(rounded.dequantize())


@pytest.mark.parametrize("group", [16, 64])
def test_int4_rounds_to_the_best_of_several_ranges(group):
    """The error of normal weights stays below that of plain rounding between the smallest and the largest one."""
    w = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    rounded = int4_groups._rounded(jnp.asarray(w), 1, group)
    assert rounded.values.dtype == jnp.int4
    assert rounded.scale.shape == rounded.offset.shape == (64, 256 // group)
    in_groups = w.reshape(64, -1, group)
    low, high = in_groups.min(axis=-1, keepdims=True), in_groups.max(axis=-1, keepdims=True)
    step = (high - low) / 15
    plain = (np.round((in_groups - low) / step) * step + low).reshape(w.shape)
    error, worse = (np.square(x - w).mean() for x in (np.asarray(rounded.dequantize()), plain))
    assert error < 0.95 * worse


def test_int4_keeps_what_it_can_hold():
    """Groups of one value, of two values, and of zeros, come back as they were."""
    w = np.concatenate([np.full(16, 3.0), np.tile([-1.0, 0.5], 8), np.zeros(16)]).astype(np.float32)[None]
    rounded = int4_groups._rounded(jnp.asarray(w), 1, 16)
    np.testing.assert_allclose(rounded.dequantize(), w, atol=2 * 2.0**-23 * 3)


@pytest.mark.parametrize("rows", [3, *slow(1)])
def test_groups_multiply_as_the_weight_that_they_stand_for(rows):
    """Over one dimension of inputs and over heads and head_dim, of which a group may hold several."""
    for shape, inputs in (((24, 64), 1), ((24, 4, 8), 2)):
        w, wide = grouped(shape, inputs=inputs)
        x = jax.random.normal(jax.random.key(0), (rows, *shape[1:]))
        exact = np.asarray(x, np.float64).reshape(rows, -1) @ wide.astype(np.float64).reshape(24, -1).T
        got = jax.jit(lambda x, w, contract=inputs: matmul(x, w, contract=contract))(x, w)
        assert_no_worse(got, x.reshape(rows, -1) @ wide.reshape(24, -1).T, exact)
    table, wide = grouped((10, 32))
    np.testing.assert_array_equal(take(table, jnp.array([[3, 9]]), jnp.float32), wide[[3, 9]][None])


def test_groups_along_heads():
    """Heads repeated and padded, as outputs and as inputs, also where a group spans several heads."""
    specs = {spec.axes[1:]: spec for _, spec in leaves(model.declare(tiny.CONFIGS["dense"])[1])}
    repeated = lambda x: jnp.pad(jnp.repeat(x, 2, axis=0), [(0, 1), *[(0, 0)] * (x.ndim - 1)])
    for axes, shape, inputs, axis in (
        (("heads", "head_dim", "embed"), (1, 4, 8, 32), 1, 1),
        (("embed", "heads", "head_dim"), (1, 24, 4, 8), 2, 2),
    ):
        w, wide = grouped(shape, inputs=inputs, group=32)
        got = w.along(specs[axes], axis, repeated).dequantize()
        want = np.moveaxis(np.asarray(repeated(jnp.moveaxis(jnp.asarray(wide), axis, 0))), 0, axis)
        np.testing.assert_array_equal(got, want)


def test_scales_are_repeated_where_devices_would_share_a_group():
    """0.5B on two devices: 14 heads of 64, groups of 128, seven heads each: half groups of 64."""
    w, wide = grouped((8, 14, 64), inputs=2, group=128)
    assert w.scale.shape == (8, 7)
    halves = w.divided(2)
    assert halves.scale.shape == (8, 14)
    np.testing.assert_array_equal(halves.dequantize(), wide)
    assert w.divided(7) is w


@pytest.mark.parametrize("rows", [3, *slow(96)])  # expert by expert, and laid out side by side
def test_experts_in_groups_multiply_as_their_widened_matrices(rows):
    E, D, F = 32, 64, 96
    matrices = [grouped(shape, group=32, seed=n)[0] for n, shape in enumerate([(E, F, D), (E, F, D), (E, D, F)])]
    temporary = experts_are_their_widened_matrices(rows, matrices, 1e-5)  # the same numbers in another order
    if rows < E:  # there are few activations: no copy of all experts is made
        assert temporary < E * F * D * 4


@pytest.mark.parametrize("name", ["moe", *slow("dense", "moe_mixed")])
def test_a_model_in_int4_is_the_model_with_the_weights_that_it_stands_for(name):
    config = tiny.CONFIGS[name]
    graphdef, specs = model.declare(config)
    run = jax.jit(lambda params, ids: (qwen2 := nnx.merge(graphdef, params)).logits(qwen2(ids).hidden_BTD))
    ids = jnp.arange(24).reshape(2, 12)
    params = tiny.random_params(config)
    params["stacks"] = convert(params["stacks"], specs["stacks"], FORMS["int4"].round)
    assert stored_forms(params) == ("int4",)
    wide = jax.tree.map(dequantize, params, is_leaf=lambda leaf: isinstance(leaf, StoredWeight))
    got, want = np.asarray(run(params, ids)), np.asarray(run(wide, ids))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())  # the same numbers summed in another order
