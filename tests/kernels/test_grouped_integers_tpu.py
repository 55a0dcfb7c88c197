# SPDX-License-Identifier: Apache-2.0
"""Experts of integers on TPU in Pallas's interpreter: numbers, races, what is refused; and the lists of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.chip_limits import CHIPS
from qwen2_jax.kernels.counts import count
from qwen2_jax.kernels.grouped_matmul import gpu as grouped_gpu
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, integers, tiles
from qwen2_jax.kernels.grouped_matmul.shapes import INTEGER_FORMS, INTEGER_SHAPES
from qwen2_jax.kernels.target import simulated
from qwen2_jax.kernels.weight_only_matmul import tpu
from qwen2_jax.kernels.workloads import OPERATIONS, group_sizes

from few import FEW, slow
from few import MANY as MANY_EXAMPLES
from integer_cases import check_experts, experts_of

KIND = CHIPS["v5e"].kind
CASES = {  # rows of each expert, all rows, outputs, inputs, inputs of a group, integers, offsets, matrices, dtype of x
    "int4, groups of 32, an expert with two blocks": ((0, 5, 0, 11), 18, 200, 384, 32, jnp.int4, True),
}
MORE = {
    "one token, int8, a scale for each output": ((0, 1, 0, 1), 2, 128, 384, None, jnp.int8, False),
    "one token, the tenth expert of 16": ((*[0] * 9, 1, *[0] * 6), 1, 256, 384, 128, jnp.int4, True),
    "no rows of any expert": ((0, 0), 3, 128, 256, 64, jnp.int4, False),
    "SwiGLU, groups of 128": ((3, 0, 9), 12, 264, 256, 128, jnp.int4, False, 2),
    "SwiGLU, int8 in groups of 64, float32": ((0, 2, 20), 24, 128, 384, 64, jnp.int8, True, 2, jnp.float32),
    "128 groups": ((4, 0, 9), 13, 128, 2048, 16, jnp.int4, True),
}
MANY = {
    "int4, groups of 64": ((30, 0, 47), 80, 264, 256, 64, jnp.int4, True),
    "SwiGLU, int8, a scale for each output": ((20, 0, 3, 30), 60, 128, 256, None, jnp.int8, False, 2),
}


def check(case, **interpreter):
    _, _, F, D, *_ = (CASES | MORE | MANY)[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "BLOCKS", {("*", "tpu, few"): {"step_bytes": 1}})
        patch.setattr(tpu, "SHORTEST", 1)
        patch.setattr(integers, "WIDENED", 3 * F * D * 2)
        if case in MANY:
            patch.setattr(integers, "FEW", 1)
        where = lambda: simulated(KIND, pltpu.InterpretParams(**interpreter))
        check_experts("tpu", where, *(CASES | MORE | MANY)[case])


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE), *slow(*MANY)])
def test_it_is_the_definition(case):
    """And the gradient of x, for which matrices are dequantised in several turns."""
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, [*MANY][1]])
def test_nothing_is_read_before_it_is_there(case):
    check(case, detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    assert not interpret_pallas_call.races.races_found


def test_what_it_refuses_goes_to_xla():
    sizes = jnp.array([1, 0])
    with simulated(KIND, pltpu.InterpretParams()):
        for D, group, dtype, message in (
            (192, 64, jnp.bfloat16, "needs inputs that are a multiple of 128, got 192"),
            (384, 96, jnp.bfloat16, "needs groups of 16, 32, 64 or a multiple of 128 inputs, got 96"),
            (128, 32, jnp.float16, "needs bfloat16 or float32"),
        ):
            x, w = jnp.ones((2, D), dtype), experts_of(2, 16, D, group)
            with pytest.raises(NotImplementedError, match=message):
                grouped_matmul(x, w, sizes, transpose_w=True, implementation="tpu")
            assert grouped_matmul(x, w, sizes, transpose_w=True).shape == (2, 16)
        for name in ("megablox", "ragged_dot"):
            with pytest.raises(NotImplementedError, match="takes no matrices of integers"):
                grouped_matmul(x, w, sizes, transpose_w=True, implementation=name)
    with pytest.raises(NotImplementedError, match="needs a tpu, this is a cpu"):
        grouped_matmul(x, w, sizes, transpose_w=True, implementation="tpu")


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("form", [*INTEGER_FORMS])
def test_counted(form, chip):
    """A token reads the integers of eight experts and little else; more rows read all integers once until it is better
    to dequantise them. Everything fits in fast memory.
    """
    for use, most in (("one token", 1.45), ("batch of 64", 1.2), ("prefill 512", 2), ("prefill 4k", 6.3)):
        shape = INTEGER_SHAPES[f"qwen2-57b-a14b {form} {use}"]
        need = OPERATIONS["grouped_weight_only"].need(shape, jnp.bfloat16, "forward")
        work = count("grouped_weight_only", "tpu", shape, group_sizes(shape), jnp.bfloat16, CHIPS[chip])["forward"]
        assert need.hbm_bytes <= work.hbm_bytes <= most * need.hbm_bytes, use
        assert work.flops >= need.flops
        assert work.fast_memory_bytes <= 0.7 * CHIPS[chip].fast_bytes


# ---------------------------------------------------------------------- lists of rows

M, E = 40, 5
GROUPS = st.lists(st.integers(0, E), max_size=M).map(lambda e: np.bincount(e, minlength=E + 1)[:E])


@MANY_EXAMPLES
@given(sizes=GROUPS, X=st.sampled_from([8, 16]))
def test_every_row_of_an_expert_has_one_place_in_a_block_of_its_own(sizes, X):
    blocks = jax.tree.map(np.asarray, integers.lay_out(jnp.asarray(sizes), M, X))
    rows, owner = sizes.sum(), np.repeat(np.arange(E), sizes)
    assert (
        blocks.number[0] == sum(-(-size // X) for size in sizes) <= len(blocks.expert_Z) == integers.capacity(M, E, X)
    )
    np.testing.assert_array_equal(blocks.owned_M, np.arange(M) < rows)
    z = blocks.place_M[:rows] // X
    np.testing.assert_array_equal(blocks.row_ZX[z, blocks.place_M[:rows] % X], np.arange(rows))
    np.testing.assert_array_equal(blocks.expert_Z[z], owner)
    assert (np.diff(blocks.expert_Z[: blocks.number[0]]) >= 0).all()


@settings(FEW, max_examples=30)
@given(sizes=GROUPS, first=st.sampled_from([1, 3]))
def test_lists_that_leave_out_the_first_experts(sizes, first):
    """Both kernels' lists for experts from `first` on name exactly their rows."""
    tile = 8
    before, owner = sizes[:first].sum(), np.append(np.repeat(np.arange(E), sizes), [E] * M)[:M] - first
    here = jnp.asarray(sizes[first:]), M, tile, before
    on_gpu = grouped_gpu.plan(*here)
    count, at = int(on_gpu.number[0]), [on_gpu.expert_Z, on_gpu.first_Z, on_gpu.begin_Z, on_gpu.end_Z]
    seen = {"gpu": (count, at)}
    on_tpu = tiles.plan(*here, cover="tiles")
    assert on_tpu.count >= 1
    seen["tpu"] = int(on_tpu.count), [on_tpu.expert_Z, on_tpu.tile_Z * tile, on_tpu.begin_Z, on_tpu.end_Z]
    for name, (count, lists) in seen.items():
        found = np.full(M, -first - 1)
        for e, row, begin, end in zip(*(np.asarray(x)[:count].tolist() for x in lists), strict=True):
            assert (found[row + begin : row + end] == -first - 1).all()
            found[row + begin : row + end] = e
        wanted = np.where(owner >= 0, owner, -first - 1)
        if name == "tpu":
            wanted = np.where(owner == E - first, -first - 1, wanted)
        np.testing.assert_array_equal(found, wanted)
