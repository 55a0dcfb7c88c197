# SPDX-License-Identifier: Apache-2.0
"""decode_attention's Hopper kernel in Pallas's simulation of the chip: results, what it reads, races, its count."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2_jax.kernels.decode_attention import decode_attention, shapes
from qwen2_jax.kernels.decode_attention.blocks import BLOCKS
from qwen2_jax.kernels.decode_attention.cache import Cache
from qwen2_jax.kernels.masks import Masks, Tokens
from qwen2_jax.kernels.target import Target, simulated
from qwen2_jax.kernels.visibility import FAR, chunk_region, visible

from decode_cases import assert_right, case
from few import FEW, MANY, slow

gpu = pytest.importorskip("qwen2_jax.kernels.decode_attention.gpu")
params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
simulation = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
simulates = pytest.mark.skipif(not hasattr(gpu.plgpu, "store"), reason="this jax's Mosaic GPU lacks plgpu.store")

HOPPER = Target("gpu", "NVIDIA H200")

# (B, T, S, N, K, H), form of the cache. Blocks are 64 slots in a ring of two stages, and there are few programs, so
# that a segment is longer than the ring.
FORMS = {
    "one query": ((2, 1, 328, 7, 1, 64), {}),
    "two tiles of rows": ((1, 3, 200, 4, 1, 128), {"chunked": True}),
    "pages": ((2, 2, 208, 4, 1, 64), {"page": 16, "chunked": True}),
    "long pages": ((2, 1, 256, 2, 1, 128), {"page": 128}),
    "int8": ((2, 2, 264, 4, 2, 64), {"int8": True, "chunked": True}),
    "int8 pages": ((2, 1, 256, 4, 1, 128), {"page": 32, "int8": True}),
    "share": ((2, 2, 208, 4, 1, 64), {"share": True, "chunked": True}),
}
ALWAYS = ("one query", "int8 pages")


def by_kernel(args, kwargs):
    """Fails if two accesses of shared memory, copies included, are not ordered by a barrier."""
    interpret = params.InterpretGPUParams(detect_races=True)
    with pytest.MonkeyPatch.context() as patch, simulated(HOPPER.kind, interpret):
        patch.setattr(gpu, "BLOCKS", {key: {"block_k": 64, "stages": 2} for key in BLOCKS})
        patch.setattr(gpu, "MULTIPROCESSORS", 1)
        patch.setattr(gpu, "ROUNDS", 1)
        patch.setattr(gpu, "MERGED", 16)
        out = decode_attention(*args, **kwargs, return_lse="first" in kwargs, implementation="gpu")
        jax.block_until_ready(out)
    assert not simulation.get_races().races_found
    return out


@simulates
@pytest.mark.parametrize("form", [x if x in ALWAYS else slow(x)[0] for x in FORMS])
@settings(FEW, max_examples=2)
@given(seed=st.integers(0, 2**16))
def test_equals_the_definition(form, seed):
    shape, options = FORMS[form]
    args, kwargs = case(seed, shape, jnp.bfloat16, **options)
    _, T, S, *_ = shape
    full = np.arange(S - T, S) + kwargs.get("first", 0)
    kwargs["q_positions_BT"][-1], kwargs["window"][-1] = full, FAR  # a full row: the ring goes round
    if "block_table_BP" in kwargs:  # whose pages all exist
        kwargs["block_table_BP"][-1] %= len(args[3])
    assert_right(by_kernel(args, kwargs), args, kwargs)


@simulates
def test_reads_nothing_else():
    """Not-a-number in every block outside a row's range, which would spread; the memory before is not-a-number too."""
    shape, _ = FORMS["one query"]
    args, kwargs = case(0, shape, jnp.bfloat16)
    *queries, k, v = args
    kwargs |= {"q_positions_BT": np.array([[70], [327]], np.int32), "window": np.array([FAR, 100], np.int32)}
    clean = by_kernel(args, kwargs)
    assert jnp.isfinite(clean).all()
    slots = np.arange(shape[2])
    needed = np.stack([slots < 128, slots >= 192])[:, None, :, None]
    poisoned = [jnp.where(needed, x, jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(by_kernel((*queries, *poisoned), kwargs), clean)
    moved = {"first": np.int32(50), "q_positions_BT": np.array([[120], [377]], np.int32)}
    np.testing.assert_array_equal(by_kernel((*queries, *poisoned), kwargs | moved)[0], clean)


@MANY
@given(seed=st.integers(0, 2**16), chunked=st.booleans(), share=st.booleans(), block=st.sampled_from([4, 16]))
def test_visits_are_what_is_visible(seed, chunked, share, block):
    """Intervals say what visibility.py says of each pair; a row's visits are the blocks that they touch, each once."""
    _, kwargs = case(seed, (3, 2, 48, 1, 1, 1), chunked=chunked, share=share)
    origin = kwargs.get("first", 0)
    at, window, chunk_len = (kwargs.get(name) for name in ("q_positions_BT", "window", "chunk_len"))
    spans = np.asarray(gpu.spans_of(Masks(Tokens(at, None), None, window, chunk_len, None), 48, origin))
    (ends_BA, shifts_BA) = np.moveaxis(np.asarray(gpu.visits_of(spans, block)), 1, 0)
    slots = np.arange(48)
    for b in range(3):
        at_T1, kv_at = at[b][:, None], slots + origin
        seen_TS = np.asarray(visible(at_T1, kv_at, window=window[b]))
        region_TS = np.asarray(chunk_region(at_T1, kv_at, chunk_len[b])) if chunked else np.zeros_like(seen_TS)
        for a in range(spans.shape[1]):
            first_T1, end_T1 = spans[b, a, 0][:, None], spans[b, a, 1][:, None]
            mine_TS = seen_TS & (region_TS == a)
            np.testing.assert_array_equal((slots >= first_T1) & (slots < end_T1), mine_TS)
            begin = ends_BA[b, a - 1] if a else 0
            visited = np.arange(begin, ends_BA[b, a]) + shifts_BA[b, a]
            touched = np.unique(np.nonzero(mine_TS)[1] // block)
            assert set(touched) <= set(visited)
            if len(touched):  # and no further than the queries of the row stand apart
                assert (visited[0], visited[-1]) == (touched[0], touched[-1])
            else:
                assert not len(visited)


LONGEST = [name for name in shapes.SHAPES if name.endswith(("one 128k", "verify 4k"))]


@pytest.mark.parametrize("name", LONGEST)
def test_count_of_real_shapes(name):
    """It moves the cache once and little else, and Dual Chunk Attention costs what plain attention costs."""
    shape = shapes.SHAPES[name]
    B, T, S, _, K, H = shape.values()
    plain = gpu.count(**shape, on=HOPPER)
    for options in ({}, {"chunk_len": 31000}, {"cache_dtype": jnp.int8, "page": 128}):
        counted = gpu.count(**shape, on=HOPPER, **options)
        cache_bytes = 2 * B * S * K * (H + 4 if "cache_dtype" in options else 2 * H)
        partial = 2**25 if T > 1 else 2**22  # results of the segments, most of which stay in the L2 cache
        assert cache_bytes <= counted.hbm_bytes <= 1.03 * cache_bytes + partial
        assert counted.fast_memory_bytes < gpu.SHARED_MEMORY - gpu.RESERVED
        if S == 131072 and "chunk_len" in options:
            assert counted.flops <= 1.03 * plain.flops and counted.hbm_bytes <= 1.03 * plain.hbm_bytes


def test_count_follows_positions_and_windows():
    shape = shapes.SHAPES["qwen2-7b batch 4k"]
    full = gpu.count(**shape, on=HOPPER)
    half = gpu.count(**shape, on=HOPPER, positions_BT=np.tile([[4095], [-1]], (32, 1)))
    window = gpu.count(**shape, on=HOPPER, window=1024)
    assert half.flops == full.flops / 2 and half.hbm_bytes < 0.52 * full.hbm_bytes
    assert window.flops == full.flops / 4 and window.hbm_bytes < 0.27 * full.hbm_bytes


def plan_of(B, T, S, N, K, H):
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, T, N, H), (B, K, S, H)))
    return gpu.make_plan(q, Cache(k, k), HOPPER)


def cut(plan, visits):
    return [np.asarray(x) for x in gpu.segments_of(jnp.asarray(visits, jnp.int32), plan)]


@MANY
@given(
    visits=st.lists(st.integers(0, 300), min_size=5, max_size=5),
    heads=st.sampled_from([1, 3]),
    spare=st.sampled_from([1, 33]),
)
def test_segments_are_all_visits(visits, heads, spare):
    """Of each head of each row, in order and once, in no more segments than there are programs."""
    plan = plan_of(5, 1, 64 * 300, heads, heads, 128)._replace(at_once=4, segments=5 * heads + spare)
    segments, parts = cut(plan, visits)
    used = 0
    for b, head in np.ndindex(5, heads):
        first, count = parts[b] @ [1, head], parts[b, 1]
        mine = segments[first : first + count]
        assert first == used and (mine[:, :2] == (b, head)).all()
        assert [number for _, _, start, n in mine for number in range(start, start + n)] == list(range(visits[b]))
        used += count
    assert used <= plan.segments == len(segments)
    assert (segments[:used, 3] > 0).all() and (segments[used:, 3] == 0).all()


def rounds(plan, visits):
    """How long the programs take, in visits, each beginning when there is room, and how long at best."""
    busy = [0] * plan.at_once
    for count in cut(plan, visits)[0][:, 3]:
        heapq.heapreplace(busy, busy[0] + count)
    return max(busy), plan.heads * sum(visits) / plan.at_once


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_full_rows_fill_the_chip(name):
    plan = plan_of(**shapes.SHAPES[name])
    longest, best = rounds(plan, [-(-plan.slots // plan.block)] * plan.batch)
    assert longest <= 1.06 * best + 1


@pytest.mark.parametrize("B", [8, 33, 64])
@pytest.mark.parametrize("name", ["qwen2-0.5b one 128k", "qwen2-7b one 128k", "qwen2-72b one 128k"])
def test_one_long_row_among_short_ones_fills_the_chip(name, B):
    plan = plan_of(**shapes.SHAPES[name] | {"B": B})
    longest, best = rounds(plan, [-(-length // plan.block) for length in [131072] + [1024] * (B - 1)])
    assert longest <= 1.3 * best + 4


REFUSED = {
    r"needs a head width of 64 or 128, got 96": {"H": 96},
    r"needs bfloat16 queries .* got float32 and float32": {"dtype": jnp.float32},
    r"needs bfloat16 queries .* got bfloat16 and float16": {"cache": jnp.float16},
    r"needs at most 64 query rows per kv head .* got 70": {"T": 10},
    r"needs a cache length that is a multiple of 8, got 1001": {"S": 1001},
    r"needs pages of a multiple of 8 slots that fit evenly with 64, got 20": {"page": 20},
    r"needs pages of a multiple of 8 slots that fit evenly with 64, got 96": {"page": 96},
    r"needs pages of a multiple of 32 slots .* got 16": {"page": 16, "cache": jnp.int8},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    odd = REFUSED[message]
    B, T, S, H, dtype = 1, odd.get("T", 1), odd.get("S", 1024), odd.get("H", 128), odd.get("dtype", jnp.bfloat16)
    q = jax.ShapeDtypeStruct((B, T, 7, H), dtype)
    k = jax.ShapeDtypeStruct((B, 1, odd.get("page", S), H), odd.get("cache", dtype))
    more = {"block_table_BP": jax.ShapeDtypeStruct((B, 8), jnp.int32)} if "page" in odd else {}
    if k.dtype == jnp.int8:
        more |= dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct(k.shape[:3], jnp.float32))

    def call(q, k, at, **more):
        return decode_attention(q, None, None, k, k, q_positions_BT=at, implementation="gpu", **more)

    at = jax.ShapeDtypeStruct((B, T), jnp.int32)
    with simulated(HOPPER.kind, params.InterpretGPUParams()), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, q, k, at, **more)


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "TPU v5 lite"])
def test_needs_hopper(kind):
    args, kwargs = case(0, FORMS["one query"][0], jnp.bfloat16)
    with simulated(kind, params.InterpretGPUParams()), pytest.raises(NotImplementedError, match=r"needs a gpu"):
        decode_attention(*args, **kwargs, implementation="gpu")
