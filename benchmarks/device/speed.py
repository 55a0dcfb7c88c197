# SPDX-License-Identifier: Apache-2.0
"""Kernels at the shapes of the real models, beside what the vendor has: qwen2_jax.kernels.bench, case by case."""

import functools
import time

import jax
import jax.numpy as jnp
from qwen2_jax.kernels import bench
from qwen2_jax.kernels.chip_limits import chip_of
from qwen2_jax.kernels.workloads import OPERATIONS, draw, parse_shape

from .pieces import Setting

WRONG = 0.02  # of the largest number: more than any bfloat16 result here errs (tests/kernels/test_bench.py)
SMALL = {
    "flash_attention": "T=64,N=2,K=1,H=64",
    "dual_chunk_attention": "T=64,N=2,K=1,H=64,chunk_len=24",
    "decode_attention": "S=128,N=2,K=1,H=64",
    "grouped_matmul": "M=64,E=4,D=64,F=64",
    "weight_only_matmul": "M=2,O=64,I=256,group=32",
    "grouped_weight_only": "M=2,E=4,D=256,F=64,group=32",
}
TRAIN, ONLY = ("forward", "backward"), ("forward",)
FAST, VENDOR = ("gpu", "tpu"), ("cudnn", "splash")
# case: (shape, passes, implementations beside the fast one, {pass: least TFLOP/s on Hopper})
FLASH = {
    "7B, 4 rows of 4k": ("qwen2-7b train", TRAIN, (*VENDOR, "xla"), {"forward": 560, "backward": 400}),
    "0.5B, 4 rows of 4k": ("qwen2-0.5b train", TRAIN, VENDOR, {"forward": 410}),
    "7B, 32k": ("qwen2-7b train-32k", TRAIN, VENDOR, {}),
    "7B, 2k of 32k": ("qwen2-7b prefill-chunk", ONLY, (), {}),
    "7B, 131k": ("T=131072,N=28,K=4,H=128", ONLY, VENDOR, {}),
}
PLAIN = ("plain causal, gpu", "plain causal, tpu")
DUAL_CHUNK = {
    "7B, 2k of 131k": ("qwen2-7b prefill-chunk 128k", ONLY, PLAIN, {}),
    "7B, 131k": ("qwen2-7b train 128k", TRAIN, PLAIN, {}),
}
DECODE = {
    f"7B at {length // 1024}k, rows: {rows}": (f"S={length},B={rows},N=28,K=4,H=128", ONLY, ("sum of the cache",), {})
    for rows, length in ((1, 4096), (64, 4096), (1, 32768), (8, 32768), (64, 32768), (8, 4096))
} | {
    "7B at 32k, rows: 8, int8": ("S=32768,B=8,N=28,K=4,H=128,int8=1", ONLY, (), {}),
    "7B at 32k, rows: 8, pages of 128": ("S=32768,B=8,N=28,K=4,H=128,page=128", ONLY, (), {}),
    "7B at 131k, rows: 1, dual chunk": ("S=131072,N=28,K=4,H=128,chunk_len=32256", ONLY, (), {}),
}
DENSE = ("one dense matmul",)
GROUPED = {
    "57B, 16k tokens": ("qwen2-57b-a14b train 16k", TRAIN, (*DENSE, "megablox"), {"forward": 430, "backward": 450}),
    "57B, 512 tokens": ("qwen2-57b-a14b prefill 512", ONLY, (*DENSE, "lax.ragged_dot", "ragged_dot"), {}),
    "57B, 64 tokens": ("qwen2-57b-a14b batch of 64", ONLY, DENSE, {}),
    "57B, one token": ("qwen2-57b-a14b one token", ONLY, DENSE, {}),
    "57B, 16k tokens, equal groups as one product": ("M=131072,E=1,D=3584,F=2560", ONLY, DENSE, {}),
}
PLAIN_PRODUCT = ("xla", "not quantised")
WEIGHT_ONLY = {
    f"{matrix}, {form}, rows: {rows}": (f"qwen2-{matrix} {form} one,M={rows}", ONLY, PLAIN_PRODUCT, {})
    for matrix, form, rows in (
        *(("7b gate", "gptq-int4", rows) for rows in (1, 8, 64, 512, 4096)),
        *(("7b down", "q4_k", rows) for rows in (1, 8, 512)),
        ("7b gate", "gptq-int8", 1),
        ("72b gate", "gptq-int4", 1),
    )
}
INTEGER_EXPERTS = {
    f"57B's experts, {form}, {use}": (f"qwen2-57b-a14b {form} {use}", ONLY, ("not quantised",), {})
    for form, use in (
        *(("gptq-int4", use) for use in ("one token", "batch of 64", "prefill 512", "prefill 4k")),
        ("q4_k", "one token"),
        ("int8", "one token"),
    )
}
OTHER_FLASH = {
    "72B, 4 rows of 4k": ("qwen2-72b train", TRAIN, VENDOR, {}),
    "72B, 32k": ("qwen2-72b train-32k", ONLY, VENDOR, {}),
}
OTHER_DECODE = {
    f"{name} at 4k, rows: {rows}": (f"S=4096,B={rows},{heads}", ONLY, ("sum of the cache",), {})
    for name, heads in (("0.5B", "N=14,K=2,H=64"), ("72B", "N=64,K=8,H=128"))
    for rows in (1, 64)
}


def time_kernel(operation, setting, shape, passes, rivals, floors):
    """{"rows": of bench.measure} of the device's own implementation and what stands beside it."""
    op = OPERATIONS[operation]
    sizes = parse_shape(operation, SMALL[operation] if setting.small else shape)
    here = chip_of(jax.devices()[0].device_kind)
    known = {name for table in op.tables() for name in table}
    known |= set(op.rivals(known, sizes, jnp.bfloat16))
    fast = [name for name in FAST if name == setting.platform] or ["xla"]
    other = {"gpu": "tpu", "tpu": "gpu"}.get(setting.platform)
    wanted = fast + [name for name in rivals if name in known and name != f"plain causal, {other}"]
    if setting.platform == "cpu":
        wanted, passes = ["xla"], ONLY
    rows, refused, failed = bench.measure(op, sizes, jnp.bfloat16, passes, wanted, 3 if setting.small else 8, here)
    draw.cache_clear()
    hopper = here is not None and here.on.generation == "hopper"
    for row in rows:
        if hopper and row["implementation"] in fast and row["pass"] in floors:
            row["floor"] = f"{floors[row['pass']]} TFLOP/s"
    wrong = [f"{row['implementation']} errs by {row['error']:.1e}" for row in rows if (row["error"] or 0) > WRONG]
    problems = wrong + [f"{name}: {why}" for name, why in failed.items()]
    return {"rows": rows, "refused": refused, "problem": "\n".join(problems)}


def timed(cases, operation, setting: Setting):
    if setting.small:
        cases = dict([*cases.items()][:1])
    return {name: functools.partial(time_kernel, operation, setting, *case) for name, case in cases.items()}


flash = functools.partial(timed, FLASH, "flash_attention")
dual_chunk = functools.partial(timed, DUAL_CHUNK, "dual_chunk_attention")
decode = functools.partial(timed, DECODE, "decode_attention")
grouped = functools.partial(timed, GROUPED, "grouped_matmul")


def weight_only(setting: Setting):
    products = timed(WEIGHT_ONLY, "weight_only_matmul", setting)
    return products | timed(INTEGER_EXPERTS, "grouped_weight_only", setting)


def other_sizes(setting: Setting):
    if setting.small:
        return {}  # at tiny shapes all sizes are one
    return timed(OTHER_FLASH, "flash_attention", setting) | timed(OTHER_DECODE, "decode_attention", setting)


def peaks(setting: Setting):
    """What the chip gives to the simplest programs: the shares in other tables may be read against these."""
    return {"copy": functools.partial(_copy, setting), "product": functools.partial(_product, setting)}


def _seconds(run, *arrays):
    jax.block_until_ready(run(*arrays))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            out = run(*arrays)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / 5)
    return best


def _copy(setting):
    x = draw(2**20 if setting.small else 2**30, dtype=jnp.bfloat16)
    gb_s = 2 * x.nbytes / _seconds(jax.jit(lambda x: -x), x) / 1e9
    here = chip_of(jax.devices()[0].device_kind)
    return {"GB/s": gb_s, "of bandwidth": here and gb_s * here.devices / here.gb_s}


def _product(setting):
    side = 256 if setting.small else 8192
    x, y = (draw(side, side, dtype=jnp.bfloat16, seed=seed) for seed in (1, 2))
    tflops = 2 * side**3 / _seconds(jax.jit(lambda x, y: x @ y), x, y) / 1e12
    here = chip_of(jax.devices()[0].device_kind)
    return {"TFLOP/s": tflops, "of peak": here and tflops * here.devices / here.tflops}
