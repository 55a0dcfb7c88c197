# SPDX-License-Identifier: Apache-2.0
"""Every kernel against its definition in float32 on the host, by the rule of the test suite (tests/tolerance.py).

A kernel may err at most twice as much as plain code in the same dtype. Each case returns the worst share of that which
was used: 1 would be the limit. Inputs come from the suite's own files, so tests/ must stand beside benchmarks/.
"""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from qwen2_jax.kernels.decode_attention import decode_attention
from qwen2_jax.kernels.dual_chunk_attention import dual_chunk_attention
from qwen2_jax.kernels.flash_attention import flash_attention
from qwen2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from qwen2_jax.kernels.target import simulated
from qwen2_jax.kernels.weight_only_matmul import weight_only_matmul

from attention_cases import arrays, layout, naive
from decode_cases import case as decode_case
from decode_cases import expected as decode_expected
from integer_cases import drawn, experts_of
from tolerance import BFLOAT16, assert_no_worse

from .pieces import Setting

# B, T, S, N, K, H; how the tokens are laid out (attention_cases.layout); whether there is a window.
ATTENTION = {
    "7 query heads share keys, a prompt continued": ((1, 333, 777, 28, 4, 128), "continued", False),
    "H 64, 14 query heads, window": ((2, 130, 515, 14, 2, 64), "continued", True),
    "packed documents, odd length": ((2, 301, 301, 8, 2, 128), "packed", False),
    "one key head, packed, window": ((1, 257, 257, 8, 1, 64), "packed", True),
    "a head of keys for each query head": ((1, 256, 256, 4, 4, 128), "continued", False),
    "positions in any order": ((1, 200, 333, 4, 2, 128), "shuffled", True),
    "nothing is visible": ((1, 64, 130, 2, 1, 64), "padding", False),
}
SMALL_ATTENTION = {"a prompt continued, window": ((1, 40, 70, 2, 1, 64), "continued", True)}
DECODE = {  # shape and form of the cache (decode_cases.case)
    "one query, 7 heads share keys": ((3, 1, 1000, 28, 4, 128), {}),
    "H 64, 14 heads": ((2, 1, 512, 14, 2, 64), {}),
    "one key head, several queries": ((2, 4, 304, 8, 1, 128), {}),
    "dual chunk": ((2, 1, 776, 28, 4, 128), {"chunked": True}),
    "pages": ((2, 1, 512, 28, 4, 128), {"page": 64}),
    "int8": ((2, 1, 520, 28, 4, 128), {"int8": True}),
    "int8 pages, dual chunk": ((2, 1, 512, 14, 2, 64), {"page": 128, "int8": True, "chunked": True}),
    "a share of the slots": ((2, 2, 208, 4, 1, 64), {"share": True, "chunked": True}),
}
SMALL_DECODE = {"one query": ((1, 1, 128, 2, 1, 64), {})}
GROUPED = {  # M, E, D, F; rows of each expert; whether weights are [E, F, D]
    "uneven groups, rows of no expert": ((1000, 6, 512, 768), (301, 0, 37, 500, 0, 1), True),
    "weights the other way round": ((640, 4, 768, 512), (128, 256, 0, 256), False),
    "fewer rows than a tile": ((19, 8, 256, 320), (0, 7, 0, 0, 1, 0, 11, 0), True),
    "all rows to one of 64": ((512, 64, 256, 256), (*[0] * 63, 512), True),
}
WEIGHT_ONLY = {  # rows, outputs, inputs, inputs of a group; integers; whether there are offsets
    "one row, int4, groups of 128": ((1, 1024, 2048, 128), jnp.int4, False),
    "8 rows, int4, groups of 32, offsets": ((8, 1152, 2304, 32), jnp.int4, True),
    "3 rows, int8, groups of 16": ((3, 512, 2048, 16), jnp.int8, True),
    "64 rows, int8, a scale for each output": ((64, 448, 1024, 1024), jnp.int8, False),
    "500 rows, int4, groups of 64, offsets": ((500, 1088, 1792, 64), jnp.int4, True),
}
SMALL_WEIGHT_ONLY = {"int4, groups of 32, offsets": ((2, 64, 256, 32), jnp.int4, True)}
INTEGER_EXPERTS = {  # M, D, F, inputs of a group (None: all); rows of each expert; integers; offsets; matrices
    "a token, int4, groups of 128": ((4, 2048, 1408, 128), (0, 1, 1, 0, 0, 1, 1, 0, 0), jnp.int4, False, 2),
    "uneven groups, int4, groups of 32, offsets": ((300, 1024, 768, 32), (101, 0, 37, 150, 0, 1), jnp.int4, True, 2),
    "few rows, int8, a scale for each output": ((90, 1408, 2048, None), (0, 70, 0, 19), jnp.int8, False, 1),
    "many rows, int4, groups of 64, offsets": ((1200, 1024, 768, 64), (301, 0, 37, 860), jnp.int4, True, 2),
}
SMALL_INTEGER_EXPERTS = {"int4, groups of 32, offsets": ((3, 128, 64, 32), (0, 2), jnp.int4, True, 1)}
SMALL_GROUPED = {"uneven groups": ((60, 3, 64, 128), (37, 0, 20), True)}


def host():
    """Within it jax computes on the CPU, in true float32."""
    return jax.default_device(jax.devices("cpu")[0])


def on_device(implementation: str, setting: Setting):
    """Within it a kernel runs: on the device that is there, or on a CPU in the interpreter of its own device."""
    if setting.platform != "cpu" or implementation not in ("gpu", "tpu"):
        return contextlib.nullcontext()
    if implementation == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        return simulated("TPU v5 lite", pltpu.InterpretParams())
    if jax.__version_info__ < (0, 12):
        raise NotImplementedError("jax before 0.12 cannot simulate all that these kernels do on a GPU")
    try:
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
        simulation = simulated("NVIDIA H200", params.InterpretGPUParams())
    except (ImportError, AttributeError) as error:
        raise NotImplementedError("this version of jax cannot simulate a GPU") from error
    kernel = importlib.import_module("qwen2_jax.kernels.decode_attention.gpu")
    kernel.MULTIPROCESSORS, kernel.ROUNDS = 1, 1  # it runs a program for each of 132, and simulates each as a thread
    return simulation


def worst(got, plain, exact) -> dict:
    """The largest share of the tolerance that some array needs. Raises AssertionError above it."""
    leaves = zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True)
    floor = lambda x: BFLOAT16 if x.dtype == jnp.bfloat16 else 1e-5  # noqa: E731
    return {"of tolerance": max(assert_no_worse(x, *others, floor=floor(x)) for x, *others in leaves)}


def with_gradients(run, inputs, cotangents, given):
    """(results, gradients of all inputs) as one program. given: other arguments, arrays at run time as in real use.

    As constants of the program, where nothing is visible, XLA:CPU (jax 0.12.0.1) gives v a gradient of memory that was
    never written.
    """

    def both(inputs, cotangents, given):
        results, pull = jax.vjp(lambda inputs: run(*inputs, **given), inputs)
        return results, pull(cotangents)

    return jax.jit(both)(inputs, cotangents, given)


def attention(implementation, setting, shape, kind, windowed, *, chunked=False, lse=True):
    """flash_attention, or dual_chunk_attention where `chunked`. lse: whether it has one that can be differentiated."""
    rotations, k, v, weights = arrays(0, shape, jnp.bfloat16, rotations=3 if chunked else 1)
    given = layout(kind, 1, shape, windowed=windowed, chunks=chunked)
    if not lse:  # these take no positions but 0, 1, ..., no segments and no window
        for name in ("q_segments_BT", "kv_segments_BS", "window"):
            del given[name]
    function = dual_chunk_attention if chunked else flash_attention
    own = functools.partial(function, implementation=implementation, return_lse=lse)
    define = functools.partial(function, implementation="reference", return_lse=lse)

    def simple(*x, **given):
        results = naive(x[:-2], *x[-2:], **given)
        return results if lse else results[0]

    inputs, cotangents = jax.tree.map(np.asarray, ((*rotations, k, v), weights if lse else weights[0]))
    with host():
        wide = jax.tree.map(lambda x: x.astype(np.float32), (inputs, cotangents))
        exact = with_gradients(define, *wide, given)
        plain = with_gradients(simple, inputs, cotangents, given)
    with on_device(implementation, setting):
        return worst(with_gradients(own, inputs, cotangents, given), plain, exact)


def decode(implementation, setting, shape, form):
    args, kwargs = jax.tree.map(np.asarray, decode_case(2, shape, jnp.bfloat16, **form))
    with host():
        plain, exact = decode_expected(args, kwargs)
    with on_device(implementation, setting):
        run = jax.jit(functools.partial(decode_attention, implementation=implementation, return_lse=True))
        return worst(run(*args, **kwargs), plain, exact)


def grouped(implementation, setting, sizes, groups, transpose_w, *, swiglu=False):
    """grouped_matmul, or grouped_swiglu. Plain code is the exact result rounded once."""
    M, E, D, F = sizes
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(jnp.bfloat16)  # noqa: E731
    weight = lambda: draw(E, F, D) if transpose_w else draw(E, D, F)  # noqa: E731
    inputs, cotangent = (draw(M, D), weight(), *([weight()] if swiglu else [])), draw(M, F)
    given = {"group_sizes_E": np.asarray(groups, np.int32)}

    def run(name):
        if swiglu:
            return functools.partial(grouped_swiglu, implementation=name)
        return functools.partial(grouped_matmul, transpose_w=transpose_w, implementation=name)

    with host():
        wide = jax.tree.map(lambda x: x.astype(np.float32), (inputs, cotangent))
        exact = with_gradients(run("reference"), *wide, given)
        plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    with on_device(implementation, setting):
        return worst(with_gradients(run(implementation), inputs, cotangent, given), plain, exact)


def weight_only(implementation, setting, sizes, values, offset):
    """weight_only_matmul and the gradient of x. Plain code is the exact result rounded once."""
    M, O, I, group = sizes
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal((M, width)).astype(jnp.bfloat16) for width in (I, O))

    def run(name):
        return lambda x, **parts: weight_only_matmul(x, **parts, implementation=name)

    with host():
        names = ("values_OI", "scale_OG", "offset_OG")
        parts = dict(zip(names, jax.tree.map(np.asarray, drawn(O, I, I // group, values, offset=offset)), strict=True))
        exact = with_gradients(run("reference"), (x.astype(np.float32),), dy.astype(np.float32), parts)
        plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    with on_device(implementation, setting):
        return worst(with_gradients(run(implementation), (x,), dy, parts), plain, exact)


def integer_experts(implementation, setting, sizes, groups, values, offset, matrices):
    """grouped_matmul of integers, of two matrices grouped_swiglu, and the gradient of x."""
    M, D, F, group = sizes
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal((M, width)).astype(jnp.bfloat16) for width in (D, F))

    def run(name):
        if matrices == 2:
            return lambda x, w, group_sizes_E: grouped_swiglu(x, *w, group_sizes_E, implementation=name)
        return lambda x, w, group_sizes_E: grouped_matmul(x, *w, group_sizes_E, transpose_w=True, implementation=name)

    with host():
        w = [experts_of(len(groups), F, D, group, values, offset=offset, seed=seed) for seed in range(matrices)]
        given = {"w": jax.tree.map(np.asarray, w), "group_sizes_E": np.asarray(groups, np.int32)}
        exact = with_gradients(run("reference"), (x.astype(np.float32) / 8,), dy.astype(np.float32), given)
        plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    with on_device(implementation, setting):
        return worst(with_gradients(run(implementation), (x / 8,), dy, given), plain, exact)


def attention_cases(implementation, setting: Setting, chunked=False):
    chosen = SMALL_ATTENTION if setting.small else ATTENTION
    run = functools.partial(attention, implementation, setting, chunked=chunked)
    return {name: functools.partial(run, *case) for name, case in chosen.items()}


def decode_cases(implementation, setting: Setting):
    chosen = SMALL_DECODE if setting.small else DECODE
    return {name: functools.partial(decode, implementation, setting, *case) for name, case in chosen.items()}


def grouped_cases(implementation, setting: Setting):
    chosen = SMALL_GROUPED if setting.small else GROUPED
    run = functools.partial(grouped, implementation, setting)
    products = {name: functools.partial(run, *case) for name, case in chosen.items()}
    gated = {f"SwiGLU, {x}": functools.partial(run, *case, swiglu=True) for x, case in chosen.items() if case[2]}
    return products | gated


def weight_only_cases(implementation, setting: Setting):
    """Hopper's kernel takes up to 64 rows."""
    chosen = SMALL_WEIGHT_ONLY if setting.small else WEIGHT_ONLY
    few = {name: case for name, case in chosen.items() if implementation != "gpu" or case[0][0] <= 64}
    made = {name: functools.partial(weight_only, implementation, setting, *case) for name, case in few.items()}
    for name, case in (SMALL_INTEGER_EXPERTS if setting.small else INTEGER_EXPERTS).items():
        made[f"experts: {name}"] = functools.partial(integer_experts, implementation, setting, *case)
    return made


flash_gpu, flash_tpu = (functools.partial(attention_cases, name) for name in ("gpu", "tpu"))
dual_chunk_gpu, dual_chunk_tpu = (functools.partial(attention_cases, name, chunked=True) for name in ("gpu", "tpu"))
decode_gpu, decode_tpu = (functools.partial(decode_cases, name) for name in ("gpu", "tpu"))
grouped_gpu, grouped_tpu = (functools.partial(grouped_cases, name) for name in ("gpu", "tpu"))
weight_only_gpu, weight_only_tpu = (functools.partial(weight_only_cases, name) for name in ("gpu", "tpu"))


def portable(setting: Setting):
    """The implementation that every chip can run, a few cases of each operation."""
    made = {
        "flash_attention": attention_cases("xla", setting),
        "dual_chunk_attention": attention_cases("xla", setting, chunked=True),
        "decode_attention": decode_cases("xla", setting),
        "grouped_matmul": grouped_cases("xla", setting),
        "weight_only_matmul": weight_only_cases("xla", setting),
    }
    few = 1 if setting.small else 3
    return {f"{op}: {name}": case for op, cases in made.items() for name, case in [*cases.items()][:few]}


def by_name(setting: Setting):
    """Implementations that only a name can choose: cuDNN; splash, megablox and ragged_dot of jax."""
    if setting.platform == "cpu":
        (case,) = SMALL_GROUPED.values()
        return {"grouped_matmul ragged_dot": functools.partial(grouped, "ragged_dot", setting, *case)}
    shape = (2, 384, 384, 14, 2, 64)
    own = {"gpu": ("cudnn", ["ragged_dot"]), "tpu": ("splash", ["megablox", "ragged_dot"])}
    attend, products = own[setting.platform]
    run = functools.partial(attention, attend, setting, shape, "whole", False, lse=False)
    wanted = {f"flash_attention {attend}": run}
    for name in products:
        case = GROUPED["uneven groups, rows of no expert"]
        wanted[f"grouped_matmul {name}"] = functools.partial(grouped, name, setting, *case)
    return wanted
