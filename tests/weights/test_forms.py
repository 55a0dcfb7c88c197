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
from qwen2_jax.weights import int8
from qwen2_jax.weights.int8 import quantize
from qwen2_jax.weights.plain import MANY_ROWS
from qwen2_jax.weights.weight import dequantize, matmul, of_experts, stored_forms, take
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
        *(("dense", False), ("moe_mixed", True)),
        *slow(("untied", False), ("moe_mixed", False), ("dense", True), ("untied", True)),
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


@pytest.mark.parametrize("rows", [3, 96])  # expert by expert, and laid out side by side
def test_int8_experts_multiply_as_their_widened_matrices(rows):
    """Values and the gradient of x; nothing like a widened copy of all experts is made."""
    E, D, F = 8, 128, 192
    rng = np.random.default_rng(0)
    x_MD = jnp.asarray(rng.normal(size=(rows, D)), jnp.float32)
    chosen_Mk = jnp.asarray(rng.permuted(np.tile(np.arange(E), (rows, 1)), axis=1)[None, :, :2])
    weights_Mk = jnp.full(chosen_Mk.shape, 0.5)
    shapes = {"gate_EFD": (E, F, D), "up_EFD": (E, F, D), "down_EDF": (E, D, F)}
    rounded = [int8._rounded(jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32), 1) for shape in shapes.values()]
    assert [w.scale.shape for w in rounded] == [(E, F), (E, F), (E, D)]

    def loss(x_MD, matrices):
        y_BTD = ops.experts(x_MD[None], chosen_Mk, weights_Mk, *map(of_experts, matrices))
        return jnp.square(y_BTD).sum(), y_BTD

    program = jax.jit(jax.grad(loss, has_aux=True))
    got, want = program(x_MD, rounded), program(x_MD, [dequantize(w) for w in rounded])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))  # 15 bits of x: 3e-5
    one_matrix = E * F * D * 4
    forward = jax.jit(lambda *args: loss(*args)[1]).lower(x_MD, rounded).compile()
    assert forward.memory_analysis().temp_size_in_bytes < one_matrix


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
