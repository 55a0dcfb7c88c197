# SPDX-License-Identifier: Apache-2.0
"""grouped_matmul, grouped_swiglu and the sorting around them: any group sizes, and work only for rows that exist."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, permute, sort_by_expert, unpermute, xla

from few import MANY, slow
from tolerance import BFLOAT16, assert_no_worse

M, E, D, F = 40, 5, 24, 16
RANDOM = np.random.default_rng(0)
GROUPS = st.one_of(
    st.lists(st.integers(0, E), min_size=0, max_size=M).map(
        lambda e: np.bincount(e, minlength=E + 1)[:E]
    ),  # E: no expert
    st.integers(0, E - 1).map(lambda e: np.bincount([e] * M, minlength=E)),  # all rows in one
    st.just(np.zeros(E, int)),
)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.standard_normal(shape), dtype)


X, GATE, UP, COTANGENT = draw(M, D), draw(E, F, D), draw(E, F, D), draw(M, F)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, arguments, cotangent):
    value, pull = jax.vjp(f, *arguments)
    return value, pull(cotangent)


def check(f, plain, arguments, group_sizes, dtype):
    """f(implementation, *arguments) in `dtype` against the reference in float32, measured by `plain` in `dtype`."""
    as_dtype = [x.astype(dtype) for x in arguments]
    group_sizes = jnp.asarray(group_sizes, jnp.int32)
    results = []
    for function, inputs in [(f("xla"), as_dtype), (plain, as_dtype), (f("reference"), arguments)]:
        value, gradients = value_and_gradients(function, (*inputs, group_sizes), COTANGENT.astype(inputs[0].dtype))
        results.append((value, gradients[:-1]))
    assert results[0][0].dtype == dtype
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=1e-5 if dtype == jnp.float32 else BFLOAT16), *results)


def plain_matmul(x, w, group_sizes, equation):
    """Each row's own matrix gathered: simple, in x's dtype, with M matrices in memory."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    y = jnp.einsum(equation, x, w[jnp.minimum(expert, w.shape[0] - 1)], preferred_element_type=jnp.float32)
    return jnp.where((expert < w.shape[0])[:, None], y, 0).astype(x.dtype)


@functools.cache
def matmul(implementation, transpose_w):
    return functools.partial(grouped_matmul, transpose_w=transpose_w, implementation=implementation)


@functools.cache
def swiglu(implementation):
    return functools.partial(grouped_swiglu, implementation=implementation)


@functools.cache
def plain_matmul_of(transpose_w):
    return functools.partial(plain_matmul, equation="md,mfd->mf" if transpose_w else "md,mdf->mf")


def plain_swiglu(x, gate, up, group_sizes):
    g, u = (plain_matmul(x, w, group_sizes, "md,mfd->mf") for w in (gate, up))
    return jax.nn.silu(g) * u


@pytest.mark.parametrize(
    ("transpose_w", "dtype"),
    [(True, jnp.float32), (False, jnp.bfloat16), *slow((True, jnp.bfloat16), (False, jnp.float32))],
)
@MANY
@given(group_sizes=GROUPS)
def test_grouped_matmul(transpose_w, dtype, group_sizes):
    w = GATE if transpose_w else GATE.swapaxes(1, 2)
    check(lambda name: matmul(name, transpose_w), plain_matmul_of(transpose_w), (X, w), group_sizes, dtype)


@pytest.mark.parametrize("dtype", [*slow(jnp.float32), jnp.bfloat16])
@MANY
@given(group_sizes=GROUPS)
def test_grouped_swiglu(dtype, group_sizes):
    check(swiglu, plain_swiglu, (X, GATE, UP), group_sizes, dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        [8, 8, 8, 8, 8],  # everybody has a share; the last one's reaches back, as there are no rows behind it
        [3, 25, 4, 4, 4],  # one has more, and the rest of it is done alone
        [0, 17, 0, 20, 1],  # too few have rows: no shares
        [9, 9, 0, 9, 9],  # rows behind the last group
        [40, 0, 0, 0, 0],
    ],
)
def test_shares_and_what_is_left(sizes):
    sizes = jnp.array(sizes)
    assert xla.share(M, E, D + F) == 16
    assert bool(xla.balanced(sizes, 16)) == (int((np.asarray(sizes) >= 4).sum()) >= 3)
    arguments = (X, GATE, UP, sizes)
    (got, gradients), (exact, others) = (
        value_and_gradients(swiglu(name), arguments, COTANGENT) for name in ("xla", "reference")
    )
    jax.tree.map(lambda a, b: assert_no_worse(a, b, b), (got, gradients[:-1]), (exact, others[:-1]))


def test_one_expert_with_few_rows():
    """Fewer rows than a share, and than a tile."""
    for rows in (1, 2, 7):
        got, exact = (
            grouped_matmul(X[:rows], GATE[:1], jnp.array([rows]), transpose_w=True, implementation=name)
            for name in ("xla", "reference")
        )
        assert_no_worse(got, exact, exact)


@pytest.mark.parametrize("tile", [2, 4, 16, 64])
def test_every_tile_size_and_a_matrix_taken_in_panels(tile, monkeypatch):
    monkeypatch.setattr(xla, "PANEL", 1)  # panels of 64 columns, of which the last reaches back
    wide, group_sizes = draw(E, 100, D), jnp.array([3, 0, 17, 1, 12])
    got = xla.grouped_matmul(X, wide, group_sizes, transpose_w=True, tile=tile)
    exact = grouped_matmul(X, wide, group_sizes, transpose_w=True, implementation="reference")
    assert_no_worse(got, exact, exact)


def test_experts_without_rows_cost_nothing():
    """Not-a-number in the matrices of idle experts would spread through any dense expansion."""
    group_sizes = jnp.array([0, 7, 0, 33, 0])
    idle = (group_sizes == 0)[:, None, None]
    clean = grouped_swiglu(X, GATE, UP, group_sizes, implementation="xla")
    poisoned = jnp.where(idle, jnp.nan, GATE)
    np.testing.assert_array_equal(grouped_swiglu(X, poisoned, UP, group_sizes, implementation="xla"), clean)

    f = lambda x, w: grouped_matmul(x, w, group_sizes, transpose_w=True, implementation="xla").sum()
    dx, dw = jax.grad(f, argnums=(0, 1))(X, poisoned)
    assert np.isfinite(dx).all()
    assert (dw[np.asarray(idle)[:, 0, 0]] == 0).all()
    assert (dw[np.asarray(~idle)[:, 0, 0]] != 0).any((1, 2)).all()


def dots(jaxpr):
    """(multiply-adds, operand shapes) of every product in a jaxpr and all it contains."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            left, right = (x.aval.shape for x in eqn.invars)
            yield math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract), (left, right, batch)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


@pytest.mark.parametrize(("rows", "experts"), [(8, 64), (4096, 64), (240, 60)])
def test_no_dense_expansion(rows, experts):
    """A product has one tile of rows and one expert, or an equal share of rows for each: never all rows for each."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, 32), (experts, 48, 32), (experts,))]
    f = functools.partial(grouped_matmul, transpose_w=True, implementation="xla")
    jaxpr = jax.make_jaxpr(
        lambda x, w, g: jax.vjp(lambda x, w: f(x, w, g.astype(jnp.int32)), x, w)[1](f(x, w, g.astype(jnp.int32)))
    )(*shapes)
    tile, share = xla.tile_rows(rows, experts), xla.share(rows, experts, 32 + 48)
    assert experts * share <= 2 * rows + 8 * experts
    found = list(dots(jaxpr.jaxpr))
    assert {bool(batch) for _, (_, _, batch) in found} == ({False, True} if share else {False})
    for multiply_adds, (_, _, batch) in found:
        assert multiply_adds <= (experts * share if batch else max(2 * tile, 16)) * 32 * 48

    random = np.random.default_rng(0)
    for sizes in (random.multinomial(rows, np.ones(experts) / experts), np.eye(experts, dtype=int)[3] * rows):
        active = np.count_nonzero(sizes)
        assert int(xla.to_visit(jnp.asarray(sizes))[1]) == active
        assert int(xla.tiles_of(sizes, tile).sum()) * tile <= rows + active * (tile - 1)


def test_tiles_never_have_one_row():
    assert [xla.tile_rows(m, e) for m, e in [(1, 1), (8, 64), (64, 16), (1000, 16), (10**6, 8)]] == [2, 2, 4, 32, 256]


# ---------------------------------------------------------------------- order


@MANY
@given(seed=st.integers(0, 2**16), shape=st.sampled_from([(1, 1), (7, 3), (16, 2)]))
def test_order_is_stable_and_its_own_inverse(seed, shape):
    experts = np.random.default_rng(seed).integers(-1, E + 1, shape)
    order = sort_by_expert(jnp.asarray(experts), E)
    named = np.where((experts < 0) | (experts >= E), E, experts).reshape(-1)
    np.testing.assert_array_equal(order.pairs_M, np.argsort(named, kind="stable"))
    np.testing.assert_array_equal(order.pairs_M[order.rows_Tk.reshape(-1)], np.arange(named.size))
    np.testing.assert_array_equal(order.group_sizes_E, np.bincount(named, minlength=E + 1)[:E])


def test_gradients_of_the_permutations_are_those_of_plain_indexing():
    experts = jnp.asarray(RANDOM.integers(0, E, (9, 3)))
    order = sort_by_expert(experts, E)
    x, y, weights = draw(9, D), draw(27, D), draw(9, 3)
    plain_permute = lambda x, _: x[order.pairs_M // 3]
    plain_unpermute = lambda y, w, _: jnp.einsum("tk,tkd->td", w, y[order.rows_Tk])
    for f, plain, arguments in [(permute, plain_permute, (x,)), (unpermute, plain_unpermute, (y, weights))]:
        value, pull = jax.vjp(lambda *a, f=f: f(*a, order), *arguments)
        expected, plain_pull = jax.vjp(lambda *a, plain=plain: plain(*a, order), *arguments)
        assert_no_worse(value, expected, expected, floor=1e-6)  # float32: the einsum may sum in another order
        cotangent = draw(*value.shape)
        for got, want in zip(pull(cotangent), plain_pull(cotangent), strict=True):
            assert_no_worse(got, want, want)
        text = str(jax.make_jaxpr(pull)(cotangent))
        assert "scatter" not in text
        assert "gather" in text


def test_a_whole_sparse_layer():
    T, K = 12, 2
    experts, weights = jnp.asarray(RANDOM.integers(0, E, (T, K))), draw(T, K)
    x, down = draw(T, D), draw(E, D, F)

    def layer(x, gate, up, down, weights):
        order = sort_by_expert(experts, E)
        h = grouped_swiglu(permute(x, order), gate, up, order.group_sizes_E, implementation="xla")
        return unpermute(
            grouped_matmul(h, down, order.group_sizes_E, transpose_w=True, implementation="xla"), weights, order
        )

    def one_expert_at_a_time(x, gate, up, down, weights):
        y = 0
        for e in range(E):
            share = jnp.sum(jnp.where(experts == e, weights, 0), axis=1, keepdims=True)
            y += share * ((jax.nn.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T)
        return y

    arguments = (x, GATE, UP, down, weights)
    cotangent = draw(T, D)
    got, exact = (value_and_gradients(f, arguments, cotangent) for f in (layer, one_expert_at_a_time))
    jax.tree.map(lambda a, b: assert_no_worse(a, b, b), got, exact)


def test_wrong_inputs_say_what_is_allowed():
    sizes = jnp.zeros(E, jnp.int32)
    with pytest.raises(ValueError, match=r"w must be \[E, D, F\] with E = 5 and D = 24"):
        grouped_matmul(X, GATE, sizes)
    with pytest.raises(ValueError, match=r"must have one shape"):
        grouped_swiglu(X, GATE, UP[:, :3], sizes)
    with pytest.raises(ValueError, match=r"'cuda' is not one of"):
        grouped_matmul(X, GATE, sizes, transpose_w=True, implementation="cuda")
