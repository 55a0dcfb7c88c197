# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of grouped_matmul and grouped_swiglu in Pallas's interpreter, and the work they do, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, megablox, reference, tiles, tpu
from qwen2_jax.kernels.grouped_matmul.shapes import EXPERTS, TOKENS
from qwen2_jax.kernels.target import Target, simulated

from few import FEW, MANY, slow
from tolerance import BFLOAT16, assert_no_worse

M, E = 40, 4
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6e"}
RANDOM = np.random.default_rng(0)
GROUPS = st.one_of(
    st.lists(st.integers(0, E), min_size=M, max_size=M).map(
        lambda e: np.bincount(e, minlength=E + 1)[:E]  # E: no expert
    ),
    st.lists(st.sampled_from([0, 8, 16]), min_size=E, max_size=E)
    .filter(lambda sizes: sum(sizes) <= M)
    .map(np.array),  # borders between tiles, not inside
    st.integers(0, E - 1).map(lambda e: np.bincount([e] * M, minlength=E)),  # all rows in one
    st.just(np.zeros(E, int)),
)


def draw(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def on(kind, **interpreter):
    return simulated(KINDS[kind], pltpu.InterpretParams(**interpreter))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, arguments, cotangent):
    value, pull = jax.vjp(f, *arguments)
    return value, pull(cotangent)


def plain_matmul(x, w, group_sizes, *, transpose_w):
    """Each row's own matrix gathered: simple, in x's dtype, with M matrices in memory."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    equation = "md,mfd->mf" if transpose_w else "md,mdf->mf"
    w = w[jnp.minimum(expert, w.shape[0] - 1)]
    y = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, precision="highest")
    return jnp.where((expert < E)[:, None], y, 0).astype(x.dtype)


def plain_swiglu(x, gate, up, group_sizes):
    g, u = (plain_matmul(x, w, group_sizes, transpose_w=True) for w in (gate, up))
    return jax.nn.silu(g) * u


@functools.cache
def problem(kernel, kind, swiglu, transpose_w, D, F, dtype, **blocks):
    """(kernel, plain code, reference), each group_sizes -> (value, gradients) of one set of arrays, compiled once."""
    ws = [draw(E, F, D) if transpose_w else draw(E, D, F) for _ in range(2 if swiglu else 1)]
    arguments, cotangent = (draw(M, D), *ws), draw(M, F)
    form = {} if swiglu else {"transpose_w": transpose_w}
    name = {"tpu": "grouped", "megablox": "grouped", "ragged_dot": "ragged"}[kernel]
    module = tpu if kernel == "tpu" else megablox
    functions = [
        getattr(module, f"{name}_{'swiglu' if swiglu else 'matmul'}"),
        plain_swiglu if swiglu else plain_matmul,
        reference.grouped_swiglu if swiglu else reference.grouped_matmul,
    ]
    functions = [functools.partial(f, **form, **(blocks if f is functions[0] else {})) for f in functions]
    inputs = [tuple(x.astype(d) for x in (*arguments, cotangent)) for d in (dtype, dtype, jnp.float32)]

    def run(i, group_sizes):
        *arguments, cotangent = inputs[i]
        value, gradients = value_and_gradients(functions[i], (*arguments, group_sizes), cotangent)
        return value, gradients[:-1]

    return [functools.partial(run, i) for i in range(3)]


def check(group_sizes, dtype, kind="v5e", *, kernel="tpu", swiglu=False, transpose_w=True, D=24, F=40, **blocks):
    runs = problem(kernel, kind, swiglu, transpose_w, D, F, dtype, **blocks)
    with on(kind):
        results = [run(jnp.asarray(group_sizes, jnp.int32)) for run in runs]
    assert results[0][0].dtype == dtype
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=1e-5 if dtype == jnp.float32 else BFLOAT16), *results)


# ---------------------------------------------------------------------- the list of visits


def every_visit(group_sizes, M, tile, cover):
    """The list of tiles.plan, from its definition."""
    visits, tile_count, end = [], -(-M // tile), 0
    last = max((e for e, size in enumerate(group_sizes) if size), default=0)
    for e, size in enumerate(group_sizes):
        begin, end = end, end + size
        for t in range(begin // tile, -(-end // tile) if size else 0):
            visits.append((e, t, max(begin - t * tile, 0), min(end - t * tile, tile)))
        if cover == "experts" and not size:
            visits.append((e, min(begin // tile, tile_count - 1), None, None))
    if cover == "tiles":
        visits += [(last, t, 0, 0) for t in range(-(-end // tile), tile_count)]
    return visits


@pytest.mark.parametrize("cover", ["tiles", "experts"])
@MANY
@given(data=st.data())
def test_the_list_of_visits_is_its_definition(cover, data):
    M, tile, E = data.draw(st.sampled_from([(38, 8, 4), (12, 4, 7)]))
    group_sizes = np.bincount(data.draw(st.lists(st.integers(0, E), max_size=M)), minlength=E + 1)[:E]
    plan = tiles.plan(jnp.asarray(group_sizes), M, tile, cover=cover)
    expected, count = every_visit(group_sizes, M, tile, cover), int(plan.count)
    assert count == len(expected) <= tiles.capacity(M, E, tile) == len(plan.expert_Z)
    for got, (e, t, begin, end) in zip(zip(*(x.tolist() for x in plan[:4]), strict=True), expected, strict=False):
        assert got[:2] == (e, t)
        assert got[2] == got[3] if begin is None else got[2:] == (begin, end)
    assert (plan.begin_Z[count:] == plan.end_Z[count:]).all()

    run_Z, expert_of_run, runs = tiles.runs(plan, E)
    np.testing.assert_array_equal(expert_of_run[run_Z], plan.expert_Z)
    assert int(runs) == len(set(plan.expert_Z.tolist()))


# ---------------------------------------------------------------------- results


@pytest.mark.slow  # quick: two of them and their product in grouped_swiglu
@settings(FEW, max_examples=3)
@given(group_sizes=GROUPS)
def test_grouped_matmul(group_sizes):
    check(group_sizes, jnp.bfloat16, tile=16)


@settings(FEW, max_examples=3)
@given(group_sizes=GROUPS)
def test_grouped_swiglu(group_sizes):
    check(group_sizes, jnp.bfloat16, swiglu=True, tile=8)


@pytest.mark.parametrize(
    ("kind", "F", "panel", "widths", "swiglu", "transpose_w"),
    [
        *slow(("v5e", 384, 256, (256, 128, 1), True, True)),  # the last panel is narrower; quick: panels, below
        *slow(("v5p", 384, 512, (256, 128, 2), False, False)),  # two cores share the panels
        *slow(("v5p", 512, 128, (128, 128, 2), False, True)),
    ],
)
@settings(FEW, max_examples=3)
@given(group_sizes=GROUPS)
def test_matrices_taken_in_panels(kind, F, panel, widths, swiglu, transpose_w, group_sizes):
    cut = tpu.product_panels(tpu.settings_for(Target("tpu", KINDS[kind]), M, E, tile=16, panel=panel), 24, F)
    assert (cut.width, cut.last, cut.cores) == widths
    check(group_sizes, jnp.float32, kind, F=F, tile=16, panel=panel, swiglu=swiglu, transpose_w=transpose_w)


@pytest.mark.slow
def test_a_product_in_several_pieces():
    check(np.array([9, 0, 25, 3]), jnp.float32, "v6e", D=128, F=1280, tile=16)


@pytest.mark.slow  # quick: test_by_name_and_by_default
@settings(FEW, max_examples=2)
@given(group_sizes=GROUPS)
def test_what_jax_brings_gives_the_same(group_sizes):
    check(group_sizes, jnp.float32, kernel="megablox", D=128, F=256, tiles=(16, 256, 256))
    check(group_sizes, jnp.float32, kernel="ragged_dot", transpose_w=False)
    check(group_sizes, jnp.float32, kernel="ragged_dot", swiglu=True)


@pytest.mark.slow
def test_rows_and_experts_keep_to_themselves():
    """Not-a-number in one group's rows, in an idle expert's matrix and behind the last group reaches nobody else."""
    D, F, group_sizes = 24, 40, jnp.array([10, 0, 17, 9])
    x, w, dy = draw(M, D), draw(E, D, F), draw(M, F)
    y, pull = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, group_sizes), x, w)
    exact = y, *pull(dy)
    x, w, dy = (
        x.at[10:27].set(jnp.nan).at[36:].set(jnp.nan),
        w.at[1].set(jnp.nan),
        dy.at[10:27].set(jnp.nan).at[36:].set(jnp.nan),
    )
    with on("v5e"):
        y, pull = jax.vjp(lambda x, w: tpu.grouped_matmul(x, w, group_sizes, tile=16), x, w)
        got = y, *pull(dy)
    rows, others = np.r_[0:10, 27:40], np.array([0, 1, 3])
    for result, expected, clean in zip(got, exact, (rows, rows, others), strict=True):
        assert_no_worse(result[clean], expected[clean], expected[clean])
        assert np.isnan(np.delete(result, clean, axis=0)).all()


def test_no_race_and_a_step_per_visit():
    """Copies and products do not overlap in one buffer; the grid is the list of visits, panel by panel."""
    D, F, tile, group_sizes = 24, 256, 16, jnp.array([10, 0, 17, 9])
    x, gate, up = draw(M, D), draw(E, F, D), draw(E, F, D)
    steps = []

    def record(token, point, core):
        steps.append(tuple(map(int, point)))
        return token

    with on("v5e", detect_races=True, grid_point_recorder=record):
        run = lambda x, gate, up: tpu.grouped_swiglu(x, gate, up, group_sizes, tile=tile, panel=128)
        y, pull = jax.vjp(run, x, gate, up)
        jax.block_until_ready(y)
        forward = steps.copy()
        gradients = jax.block_until_ready(pull(jnp.ones_like(y)))
    exact, exact_pull = jax.vjp(lambda *a: reference.grouped_swiglu(*a, group_sizes), x, gate, up)
    jax.tree.map(lambda a, b: assert_no_worse(a, b, b), (y, gradients), (exact, exact_pull(jnp.ones_like(y))))
    visits = len(every_visit(group_sizes.tolist(), M, tile, "tiles"))
    assert forward == [(0, panel, v) for panel in range(2) for v in range(visits)]


def test_by_name_and_by_default():
    x, w, group_sizes = draw(4, 24), draw(E, 40, 24), jnp.array([1, 0, 3, 0])
    exact = reference.grouped_matmul(x, w, group_sizes, transpose_w=True)
    with on("v5e"):
        for implementation in ("tpu", None):
            got = grouped_matmul(x, w, group_sizes, transpose_w=True, implementation=implementation)
            assert_no_worse(got, exact, exact)
        exact = reference.grouped_swiglu(x, w, w, group_sizes)
        assert_no_worse(grouped_swiglu(x, w, w, group_sizes, implementation="tpu"), exact, exact)


# ---------------------------------------------------------------------- counted work


def group_sizes_of(rows, experts):
    """Even, random, skewed, all in one expert, and borders just before and after the tiles' borders."""
    yield np.full(experts, rows // experts)
    yield RANDOM.multinomial(rows, np.ones(experts) / experts)
    yield RANDOM.multinomial(rows, RANDOM.dirichlet(np.full(experts, 0.1)))
    yield np.eye(experts, dtype=int)[3] * rows
    size = rows // experts
    yield np.r_[1, np.full(experts - 2, size), 0]  # no border between groups is one between tiles
    yield np.r_[np.ones(min(experts, rows) - 1, int), np.zeros(max(experts - rows, 0), int), max(rows - experts, 0) + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", EXPERTS)
def test_products_exceed_those_of_the_rows_by_a_tile_per_border(model, kind):
    E, D, F, top_k = (EXPERTS[model][name] for name in ("E", "D", "F", "top_k"))
    target = Target("tpu", KINDS[kind])
    for use in ("batch of 64", "train 16k"):
        M = TOKENS[use] * top_k
        settings = tpu.settings_for(target, M, E)
        for group_sizes in group_sizes_of(M, E):
            for a, b, swiglu in [(D, F, True), (F, D, False)]:  # gate and up, and down
                counts = tpu.count(M, a, b, jnp.asarray(group_sizes), on=target, swiglu=swiglu)
                for name, counted in counts.items():
                    products = 2 if swiglu and name not in ("dgate", "dup") else 1
                    assert counted.flops <= products * 2 * D * F * (M + E * settings.tile), (name, use)
                    assert counted.flops >= products * 2 * D * F * int(group_sizes.sum())
                    assert counted.fast_memory_bytes <= settings.memory


def test_matrices_are_read_once_per_expert_with_rows():
    """One token at Qwen2-57B-A14B: 8 of 64 matrices come in, once each, and little else."""
    D, F, target = 3584, 2560, Target("tpu", KINDS["v5e"])
    group_sizes = jnp.zeros(64, jnp.int32).at[jnp.arange(8) * 7].set(1)
    counted = tpu.count(8, D, F, group_sizes, on=target)["forward"]
    assert 8 * D * F * 2 <= counted.hbm_bytes <= 1.01 * 8 * D * F * 2
    group_sizes = jnp.full(64, 2048)
    counted = tpu.count(131072, D, F, group_sizes, on=Target("tpu", KINDS["v6e"]))["forward"]
    assert counted.hbm_bytes == 2 * (64 * D * F + 131072 * (D + F))  # everything once


# ---------------------------------------------------------------------- bad input


def test_what_the_kernel_does_not_take():
    x, w, group_sizes = draw(4, 24), draw(E, 40, 24), jnp.array([1, 0, 3, 0])
    for implementation in ("tpu", "megablox"):
        with pytest.raises(NotImplementedError, match="needs a tpu, this is a cpu"):
            grouped_matmul(x, w, group_sizes, transpose_w=True, implementation=implementation)
    with on("v5e"):
        with pytest.raises(NotImplementedError, match="needs bfloat16 or float32, one for x and w, got float16"):
            tpu.grouped_matmul(x.astype(jnp.float16), w, group_sizes, transpose_w=True)
        with pytest.raises(NotImplementedError, match="needs at least one row, expert and column"):
            tpu.grouped_matmul(x[:0], w, group_sizes, transpose_w=True)
        wide = jax.ShapeDtypeStruct((4, 200_000), jnp.float32), jax.ShapeDtypeStruct((E, 128, 200_000), jnp.float32)
        with pytest.raises(NotImplementedError, match="needs matrices of which 128 columns fit in"):
            jax.eval_shape(lambda x, w: tpu.grouped_matmul(x, w, group_sizes, transpose_w=True), *wide)


@pytest.mark.parametrize("group_sizes", [[3, 3, 1], [3, -1, 4]])
def test_group_sizes_beyond_the_rows_are_found_by_checkify(group_sizes):
    x, w = jnp.ones((6, 8)), jnp.ones((3, 4, 8))
    for f in (
        lambda sizes: grouped_matmul(x, w, sizes, transpose_w=True, implementation="xla"),
        lambda sizes: grouped_swiglu(x, w, w, sizes, implementation="xla"),
    ):
        checked = checkify.checkify(jax.jit(f))
        with pytest.raises(checkify.JaxRuntimeError, match="must be >= 0 and sum to at most M = 6 rows, got"):
            checked(jnp.array(group_sizes))[0].throw()
        checked(jnp.array([3, 2, 0]))[0].throw()  # fewer: rows after the last group give zeros
