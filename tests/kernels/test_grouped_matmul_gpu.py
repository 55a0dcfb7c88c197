# SPDX-License-Identifier: Apache-2.0
"""grouped_matmul and grouped_swiglu on Hopper, in Pallas's simulation of the chip: numbers, races, refusals, work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.grouped_matmul.shapes import SHAPES
from qwen2_jax.kernels.target import Target, simulated

from few import FEW, MANY, slow
from tolerance import BFLOAT16, assert_no_worse

gpu = pytest.importorskip("qwen2_jax.kernels.grouped_matmul.gpu")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")

SIMULATES = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the simulation of jax before 0.12 has no wgmma with a transposed operand"
)
HOPPER = Target("gpu", "NVIDIA H200")
SIMULATED = plgpu.InterpretGPUParams(detect_races=True)
M, E, D, F = 100, 3, 128, 192
ONE_CONSUMER = {"tile": 64, "width": 128, "left": 64, "right": 192, "stages": 3}
TWO_CONSUMERS = {"tile": 128, "width": 256, "left": 128, "right": 192, "stages": 2, "programs": 3}

RANDOM = np.random.default_rng(0)
GROUPS = st.one_of(
    st.lists(st.integers(0, E), min_size=M, max_size=M).map(lambda e: np.bincount(e, minlength=E + 1)[:E]),
    st.lists(st.integers(0, M), min_size=E, max_size=E).map(
        lambda ends: np.diff(np.sort(ends), prepend=0)  # uneven, with short and empty groups
    ),
    st.integers(0, E - 1).map(lambda e: np.bincount([e] * M, minlength=E)),  # all rows in one
    st.just(np.zeros(E, int)),
)
VERY_FEW = settings(FEW, max_examples=1)  # one takes seconds, and UNEVEN is another
UNEVEN = example(group_sizes=np.array([37, 0, 50]))  # no border at a multiple of anything, and rows of no group


def draw(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.bfloat16)


X, GATE, UP, COTANGENT = draw(M, D), draw(E, F, D), draw(E, F, D), draw(M, F)


@functools.cache
def value_and_gradients(f):
    def run(arguments, group_sizes, cotangent):
        value, pull = jax.vjp(lambda *a: f(*a, group_sizes), *arguments)
        return value, pull(cotangent)

    return jax.jit(run)


@functools.cache
def simulation_of(f, shapes):
    """Compiled ahead: a jitted function with a simulation inside is compiled again at its second call."""
    *arguments, cotangent = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    with simulated("NVIDIA H200", SIMULATED):
        sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
        return value_and_gradients(f).lower(tuple(arguments), sizes, cotangent).compile()


def on_gpu(f, arguments, group_sizes, cotangent=COTANGENT):
    """Value and gradients in the simulation, which must not see a race."""
    run = simulation_of(f, tuple(x.shape for x in (*arguments, cotangent)))
    results = jax.block_until_ready(run(arguments, jnp.asarray(group_sizes, jnp.int32), cotangent))
    assert not simulation.get_races().races_found
    return results


@functools.cache
def matmul(transpose_w, **blocks):
    return lambda x, w, sizes: gpu.grouped_matmul(x, w, sizes, transpose_w=transpose_w, **blocks)


@functools.cache
def swiglu(**blocks):
    return functools.partial(gpu.grouped_swiglu, **blocks)


@functools.cache
def exact_matmul(transpose_w):
    return functools.partial(grouped_matmul, transpose_w=transpose_w, implementation="reference")


exact_swiglu = functools.partial(grouped_swiglu, implementation="reference")


def check(got, exact, arguments, group_sizes, cotangent=COTANGENT):
    """Against the reference in float32, measured by the reference's result rounded to bfloat16."""
    wide = [x.astype(jnp.float32) for x in arguments]
    exact = value_and_gradients(exact)(tuple(wide), jnp.asarray(group_sizes, jnp.int32), cotangent.astype(jnp.float32))
    naive = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
    jax.tree.map(lambda *x: assert_no_worse(*x, floor=BFLOAT16), got, naive, exact)


@SIMULATES
@pytest.mark.parametrize(("transpose_w", "blocks"), [(True, TWO_CONSUMERS), *slow((False, ONE_CONSUMER))])
@VERY_FEW
@UNEVEN
@given(group_sizes=GROUPS)
def test_grouped_matmul(transpose_w, blocks, group_sizes):
    arguments = X, GATE if transpose_w else GATE.swapaxes(1, 2)
    got = on_gpu(matmul(transpose_w, **blocks), arguments, group_sizes)
    check(got, exact_matmul(transpose_w), arguments, group_sizes)


@pytest.mark.slow  # quick: a step of decoding, and the same products one by one
@SIMULATES
@VERY_FEW
@UNEVEN
@given(group_sizes=GROUPS)
def test_grouped_swiglu(group_sizes):
    arguments, cotangent = (X, GATE[:, :128], UP[:, :128]), COTANGENT[:, :128]
    got = on_gpu(swiglu(**TWO_CONSUMERS), arguments, group_sizes, cotangent)
    check(got, exact_swiglu, arguments, group_sizes, cotangent)


@pytest.mark.slow  # quick: rows of no group, and an expert without rows, in the example above
@SIMULATES
def test_rows_and_matrices_of_others_may_hold_anything():
    """Rows of nobody, the matrix of an expert without rows, and what one expert's rows hold for the next."""
    sizes = np.array([50, 0, 37])
    x = X.at[87:].set(jnp.nan)
    gate = GATE.at[1].set(jnp.nan)
    f = matmul(True, **TWO_CONSUMERS)
    y, (dx, dw) = on_gpu(f, (x, gate), sizes, COTANGENT.at[87:].set(jnp.nan))
    clean = on_gpu(f, (X, GATE), sizes)
    for got, want in ((y, clean[0]), (dx[:87], clean[1][0][:87]), (dw, clean[1][1])):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert (dw[1] == 0).all() and (y[87:] == 0).all() and (dx[87:] == 0).all()


@SIMULATES
@pytest.mark.parametrize("rows", [*slow(1), 20])
def test_a_step_of_decoding(rows):
    """Fewer rows than a tile has, as many experts as rows; through the public function and the table's block sizes."""
    sizes = np.bincount(RANDOM.permutation(E)[:rows] if rows <= E else RANDOM.integers(0, E, rows), minlength=E)
    f = functools.partial(grouped_swiglu, group_sizes_E=jnp.asarray(sizes))
    with simulated("NVIDIA H200", SIMULATED):
        got = jax.jit(functools.partial(f, implementation="gpu"))(X[:rows], GATE, UP)
    exact = f(X[:rows].astype(jnp.float32), GATE, UP, implementation="reference")
    assert_no_worse(got, exact.astype(jnp.bfloat16), exact, floor=BFLOAT16)
    assert not simulation.get_races().races_found


# ---------------------------------------------------------------------- the list


@MANY
@given(group_sizes=GROUPS, tile=st.sampled_from([64, 128]))
def test_the_list_names_every_row_once(group_sizes, tile):
    visits = jax.tree.map(np.asarray, gpu.plan(jnp.asarray(group_sizes), M, tile))
    assert visits.number[0] <= len(visits.expert_Z) == gpu.capacity(M, E, tile)
    assert (visits.first_Z % gpu.ALIGNED == 0).all()
    owner = np.full(M, -1)
    for e, first, begin, end in zip(*(x[: visits.number[0]] for x in visits[:4]), strict=True):
        assert 0 <= begin < end <= tile
        assert (owner[first + begin : first + end] == -1).all()
        owner[first + begin : first + end] = e
    np.testing.assert_array_equal(owner, np.append(np.repeat(np.arange(E), group_sizes), [E] * M)[:M])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("matrices", [1, 2])
def test_counted_work(name, matrices):
    """The products of whole tiles: those of the rows, and at most a tile more per expert and a tile's width."""
    shape = SHAPES[name]
    M, E, D, F = (shape[x] for x in "MEDF")
    sizes = np.bincount(np.random.default_rng(0).integers(0, E, M), minlength=E)
    active = np.count_nonzero(sizes)
    row = gpu._settings_for(HOPPER, M, E, {"programs": 1})
    of = functools.partial(gpu.count, M, E, D, F, on=HOPPER, matrices=matrices, group_sizes_E=sizes)

    forward = of(which="forward")
    widest = F + row.width // matrices - F % (row.width // matrices) if F % (row.width // matrices) else F
    assert 2 * M * D * F * matrices <= forward.flops <= 2 * (M + active * (row.tile + 6)) * D * widest * matrices
    step = of(which="step")
    assert step.fast_memory_bytes <= 227 * 1024
    if M > 100 * E:
        assert forward.flops <= 1.16 * 2 * M * D * F * matrices
        assert step.flops <= 1.16 * 6 * M * D * F * matrices
    weights = 2 * matrices * active * D * F
    assert weights <= forward.hbm_bytes <= weights + 2 * ((M + active * (row.tile + 6)) * D + M * F)


# ---------------------------------------------------------------------- refusals


def test_inputs_that_it_does_not_take():
    sizes = jnp.zeros(E, jnp.int32)
    run = functools.partial(grouped_matmul, group_sizes_E=sizes, transpose_w=True, implementation="gpu")
    with pytest.raises(NotImplementedError, match=r"needs a gpu"):
        run(X, GATE)
    older, refused = simulated("NVIDIA A100-SXM4-80GB", SIMULATED), pytest.raises(NotImplementedError, match=r"hopper")
    with older, refused:
        run(X, GATE)
    with simulated("NVIDIA H200", SIMULATED):
        with pytest.raises(NotImplementedError, match=r"needs bfloat16 \(float32 goes to 'xla'\), got float32"):
            run(X.astype(jnp.float32), GATE.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match=r"widths that are multiples of 64"):
            run(X, GATE[:, :40])
        with pytest.raises(NotImplementedError, match=r"needs rows"):
            run(X[:0], GATE)
