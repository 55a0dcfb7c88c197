# SPDX-License-Identifier: Apache-2.0
"""flash_attention: values and gradients against the definition, any layout of tokens; what it skips; what it stores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from qwen2_jax.kernels.flash_attention import flash_attention, xla
from qwen2_jax.kernels.masks import make_masks

from attention_cases import arrays, naive
from attention_layouts import BLOCKS, SHAPES, layouts
from few import MANY
from tolerance import assert_no_worse, assert_no_worse_at_random


def by_small_blocks(q, k, v, **layout):
    """The xla implementation with blocks so small that short inputs have several. Returns (out, lse)."""
    return xla.flash_attention((q,), k, v, make_masks({"q": q}, k, v, **layout), **BLOCKS)


def reference(q, k, v, **layout):
    return flash_attention(q, k, v, return_lse=True, implementation="reference", **layout)


def eager(q, k, v, **layout):
    return naive((q,), k, v, **layout)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, weights, layout):
    """((out, lse), gradients of q, k, v and the scale) of a weighted sum of both results; rows without lse left out."""
    layout = dict(layout)
    scale = layout.pop("scale")

    def total(q, k, v, scale):
        out, lse = attend(q, k, v, scale=scale, **layout)
        finite = jnp.isfinite(lse)
        return (out * weights[0]).sum(dtype=jnp.float32) + jnp.where(finite, lse * weights[1], 0).sum(), (out, lse)

    gradients, results = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, scale)
    return results, (*gradients[:-1], gradients[-1] / math.prod(k.shape[1:]))  # the scale's is a sum over everything


@MANY
@given(layouts())
def test_equals_the_definition_in_float32(case):
    shape, seed, layout = case
    queries, k, v, weights = arrays(seed, shape)
    got = value_and_gradients(by_small_blocks, *queries, k, v, weights, layout)
    exact = value_and_gradients(reference, *queries, k, v, weights, layout)
    jax.tree.map(lambda x, y: assert_no_worse(x, y, y), got, exact)


@MANY
@given(layouts(SHAPES[:1]))
def test_no_worse_than_plain_bfloat16(case):
    shape, seed, layout = case
    queries, k, v, weights = arrays(seed, shape, jnp.bfloat16)
    got = value_and_gradients(by_small_blocks, *queries, k, v, weights, layout)
    plain = value_and_gradients(eager, *queries, k, v, weights, layout)
    exact = value_and_gradients(
        reference, *jax.tree.map(lambda x: x.astype(jnp.float32), (*queries, k, v, weights)), layout
    )
    assert got[0][0].dtype == jnp.bfloat16
    assert got[0][1].dtype == jnp.float32
    jax.tree.map(assert_no_worse_at_random, got, plain, exact)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_that_see_nothing_are_zero_in_value_and_gradient(implementation):
    (q,), k, v, (weights, _) = arrays(0, (2, 6, 6, 4, 2, 8))
    positions = jnp.array([[0, 1, 2, 3, -1, -1], [-1] * 6])
    attend = functools.partial(
        flash_attention,
        q_positions_BT=positions,
        kv_positions_BS=positions,
        return_lse=True,
        implementation=implementation,
    )
    (out, lse), pull = jax.vjp(jax.jit(attend), q, k, v)
    dq, dk, dv = pull((weights, jnp.zeros_like(lse)))
    seen = np.asarray(positions) >= 0
    for x in (out, dq, dk, dv):
        assert (np.asarray(x)[~seen] == 0).all()
    for x in (out, dv):
        assert (np.asarray(x)[seen] != 0).any(-1).all()
    assert (np.asarray(lse)[~seen] == -np.inf).all()


def test_one_query_and_lengths_that_are_no_multiple_of_anything():
    for shape in [(2, 1, 1, 1, 1, 8), (1, 131, 150, 2, 1, 8)]:
        B, T, S, *_ = shape
        (q,), k, v, _ = arrays(1, shape)
        layout = {
            "q_positions_BT": jnp.broadcast_to(jnp.arange(S - T, S), (B, T)),
            "kv_positions_BS": jnp.broadcast_to(jnp.arange(S), (B, S)),
        }
        exact = flash_attention(q, k, v, implementation="reference", **layout)
        assert_no_worse(flash_attention(q, k, v, implementation="xla", **layout), exact, exact)


def test_blocks_nobody_sees_are_not_computed():
    """Not-a-number in every value that no block of queries may need: it would spread through any product."""
    (q,), k, v, _ = arrays(2, (1, 32, 64, 2, 1, 8))
    layout = {"q_positions_BT": 16 + jnp.arange(32)[None], "kv_positions_BS": jnp.arange(64)[None], "scale": 0.3}
    clean, _ = by_small_blocks(q, k, v, window=1, **layout)
    poisoned = v.at[:, :16].set(jnp.nan).at[:, 48:].set(jnp.nan)
    out, _ = by_small_blocks(q, k, poisoned, window=1, **layout)
    np.testing.assert_array_equal(out, clean)
    gradient = jax.grad(lambda q: by_small_blocks(q, k, poisoned, window=1, **layout)[0].sum())(q)
    assert np.isfinite(gradient).all()


def test_memory_grows_with_the_length_not_its_square():
    def temporary_bytes(length):
        q, kv = (jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2))
        at = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def step(q, k, v, at):
            loss = lambda q, k, v: flash_attention(
                q, k, v, q_positions_BT=at, kv_positions_BS=at, implementation="xla"
            ).sum()
            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

        return jax.jit(step).lower(q, kv, kv, at).compile().memory_analysis().temp_size_in_bytes

    half, full = temporary_bytes(2048), temporary_bytes(4096)
    assert full < 2.6 * half
    assert full < 4096 * 4096 * 4, "one head's table of logits alone would be larger"


def test_wrong_inputs_say_what_is_allowed():
    (q,), k, v, _ = arrays(0, (2, 4, 6, 3, 1, 8))
    at = {"q_positions_BT": jnp.zeros((2, 4), jnp.int32), "kv_positions_BS": jnp.zeros((2, 6), jnp.int32)}
    with pytest.raises(ValueError, match=r"N must be a multiple of K"):
        flash_attention(q, jnp.zeros((2, 6, 2, 8)), v, **at)
    with pytest.raises(ValueError, match=r"v must be \(2, 6, 1, 8\)"):
        flash_attention(q, k, v[:, :3], **at)
    with pytest.raises(ValueError, match=r"kv_positions_BS must be \(2, 6\)"):
        flash_attention(q, k, v, **at | {"kv_positions_BS": at["q_positions_BT"]})
    with pytest.raises(ValueError, match=r"give both"):
        flash_attention(q, k, v, q_segments_BT=at["q_positions_BT"], **at)
    with pytest.raises(ValueError, match=r"window must be one number or one per row"):
        flash_attention(q, k, v, window=jnp.ones(3), **at)
    with pytest.raises(ValueError, match=r"'cuda' is not one of .*'xla', 'reference'"):
        flash_attention(q, k, v, implementation="cuda", **at)
