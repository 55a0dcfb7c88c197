# SPDX-License-Identifier: Apache-2.0
"""decode_attention's TPU kernel in Pallas's interpreter: results, what it reads, races, and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from qwen2_jax.kernels.decode_attention import decode_attention, shapes, tpu
from qwen2_jax.kernels.decode_attention.blocks import BLOCKS
from qwen2_jax.kernels.target import Target, simulated
from qwen2_jax.kernels.visibility import FAR

from decode_cases import assert_right, case
from few import FEW, slow

V5E, V5P = "TPU v5 lite", "TPU v5"  # one core, and two that share the work

# (B, T, S, N, K, H), dtype, chip, form of the cache. Pieces are as small as the layout allows (8, 16 or 128 slots) and
# blocks two pieces, so short caches have several blocks.
FORMS = {
    "float32": ((3, 1, 96, 3, 1, 128), jnp.float32, V5E, {}),
    "slots last": ((2, 2, 640, 4, 2, 64), jnp.bfloat16, V5P, {"chunked": True}),
    "pages": ((3, 2, 96, 4, 2, 128), jnp.bfloat16, V5P, {"page": 32, "chunked": True}),
    "int8": ((2, 3, 640, 2, 2, 128), jnp.float32, V5P, {"int8": True, "chunked": True}),
    "int8 pages": ((2, 1, 512, 4, 2, 64), jnp.bfloat16, V5E, {"page": 256, "int8": True}),
    "share, one core": ((3, 2, 96, 4, 2, 128), jnp.bfloat16, V5E, {"share": True, "chunked": True}),
    "share, two cores": ((3, 1, 640, 4, 2, 64), jnp.bfloat16, V5P, {"share": True, "page": 128, "chunked": True}),
}
ALWAYS = ("int8 pages", "share, two cores")  # in the last, slots are last


def by_kernel(device, args, kwargs, **interpret):
    with pytest.MonkeyPatch.context() as patch, simulated(device, pltpu.InterpretParams(**interpret)):
        k = args[3]
        piece = 128 if k.shape[-1] == 64 or k.dtype == jnp.int8 else 32 // k.dtype.itemsize
        small = {"piece_bytes": 1, "block_bytes": 2**20, "block_slots": 2 * piece}
        patch.setattr(tpu, "BLOCKS", {key: sizes | small for key, sizes in BLOCKS.items() if key[1] == "tpu"})
        return decode_attention(*args, **kwargs, return_lse="first" in kwargs, implementation="tpu")


@pytest.mark.parametrize("form", [x if x in ALWAYS else slow(x)[0] for x in FORMS])
@settings(FEW, max_examples=3)
@given(seed=st.integers(0, 2**16))
def test_equals_the_definition(form, seed):
    shape, dtype, device, options = FORMS[form]
    args, kwargs = case(seed, shape, dtype, **options)
    assert_right(by_kernel(device, args, kwargs), args, kwargs)


@pytest.mark.parametrize("form", ["pages", *slow("int8")])
def test_no_races(form):
    """With both cores at once, and copies that run only when somebody waits for them."""
    shape, dtype, device, options = FORMS[form]
    args, kwargs = case(1, shape, dtype, **options)
    got = by_kernel(device, args, kwargs, detect_races=True, num_cores_or_threads=2)
    assert not interpret_pallas_call.races.races_found
    assert_right(got, args, kwargs)


def test_reads_nothing_else():
    """Not-a-number in every piece outside a row's range, which would spread; the memory before is not-a-number too."""
    args, kwargs = case(0, *FORMS["float32"][:2])
    *queries, k, v = args
    piece = 8
    kwargs |= {"q_positions_BT": np.array([[40], [-1], [95]], np.int32), "window": np.array([FAR, FAR, 20], np.int32)}
    clean = by_kernel(V5E, args, kwargs)
    assert (clean[1] == 0).all()
    slots = np.arange(96)[:, None]
    needed = [slots < 41, slots < 0, slots >= 76]
    needed = np.stack([np.repeat(x.reshape(-1, piece).any(1), piece) for x in needed])[:, None, :, None]
    poisoned = [jnp.where(needed, x, jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(by_kernel(V5E, (*queries, *poisoned), kwargs), clean)
    moved = {"first": np.int32(50), "q_positions_BT": np.array([[90], [49], [145]], np.int32)}
    np.testing.assert_array_equal(by_kernel(V5E, (*queries, *poisoned), kwargs | moved)[0], clean)


def test_plan():
    cut = tpu.Cut(page=1000, piece=10, pieces=4, parts=2, slots_last=False)
    at = jnp.array([[99, 100], [-1, -1], [5000, -1], [5, 6]])
    work = tpu.plan(at, None, 1000, cut)
    assert work.first.tolist() == [0, 0, 0, 0]
    assert work.end.tolist() == [11, 0, 100, 1]
    assert work.starts.tolist() == [0, 3, 3, 28, 29]
    work = tpu.plan(at, jnp.array([1, 1, 50, 100]), 1000, cut)
    assert (work.end - work.first).tolist() == [2, 0, 0, 1]  # the third row has left the cache behind
    assert work.first.tolist()[0] == 9


ONE_CORE, TWO_CORES = Target("tpu", V5E), Target("tpu", V5P)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_count_of_real_shapes(name):
    """It moves the cache, once, and little else; with room to spare in fast memory, of which a kernel has 16 MiB."""
    shape = shapes.SHAPES[name]
    B, _, S, _, K, H = shape.values()
    for on, most, options in (
        (ONE_CORE, 1.02, {}),
        (ONE_CORE, 1.04, {"cache_dtype": jnp.int8, "page": 128}),
        (TWO_CORES, 1.15, {"chunk_len": 32256}),  # short rows: either core has a float32 result for each
    ):
        counted = tpu.count(**shape, on=on, **options)
        cache_bytes = 2 * B * S * K * (H + 4 if "cache_dtype" in options else 2 * H)
        assert cache_bytes <= counted.hbm_bytes <= most * cache_bytes + 2**18
        assert counted.fast_memory_bytes < 12 * 2**20


def test_count_follows_positions_and_windows():
    shape = shapes.SHAPES["qwen2-7b batch 4k"]
    full = tpu.count(**shape, on=ONE_CORE)
    half = tpu.count(**shape, on=ONE_CORE, positions_BT=np.tile([[4095], [-1]], (32, 1)))
    window = tpu.count(**shape, on=ONE_CORE, window=1024)
    assert half.hbm_bytes < 0.52 * full.hbm_bytes and half.flops == full.flops / 2
    assert window.hbm_bytes < 0.27 * full.hbm_bytes


REFUSED = {
    r"head width of 64 or 128, got 96": {"H": 96},
    r"bfloat16 or float32, got float16": {"dtype": jnp.float16, "cache": jnp.float16},
    r"dtype of the queries, bfloat16, or in int8, got float32": {"cache": jnp.float32},
    r"multiple of 16 slots for bfloat16 and a head width of 128, got 1000": {"S": 1000},
    r"multiple of 128 slots for bfloat16 and a head width of 64, got 1040": {"S": 1040, "H": 64},
    r"at most 128 query rows per key head, got 20 queries of 7 heads": {"T": 20},
    r"block table of at most 131072 entries, got 262144": {"page": 16, "P": 2**18},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    odd = REFUSED[message]
    B, T, S, H, dtype = 1, odd.get("T", 1), odd.get("S", 1024), odd.get("H", 128), odd.get("dtype", jnp.bfloat16)
    q = jax.ShapeDtypeStruct((B, T, 7, H), dtype)
    k = jax.ShapeDtypeStruct((B, 1, odd.get("page", S), H), odd.get("cache", dtype))
    table = {"block_table_BP": jax.ShapeDtypeStruct((B, odd["P"]), jnp.int32)} if "P" in odd else {}

    def call(q, k, at, **table):
        return decode_attention(q, None, None, k, k, q_positions_BT=at, implementation="tpu", **table)

    at = jax.ShapeDtypeStruct((B, T), jnp.int32)
    with simulated(V5E, pltpu.InterpretParams()), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, q, k, at, **table)


def test_needs_a_tpu():
    args, kwargs = case(0, *FORMS["float32"][:2])
    with pytest.raises(NotImplementedError, match=r"needs a tpu, this is a cpu"):
        decode_attention(*args, **kwargs, implementation="tpu")
