# SPDX-License-Identifier: Apache-2.0
"""The whole model on this device: its numbers against recordings and the host's, its speed with random weights.

Training is in training.py: it needs more packages.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import accelerator_cases
import qwen2_jax
from qwen2_jax import model
from qwen2_jax.config import PRESETS, DualChunk, ModelConfig
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.lm import LM
from qwen2_jax.model import flops
from qwen2_jax.parallel import chips
from qwen2_jax.weights import params
from tolerance import BFLOAT16, assert_no_worse

from .checks import host
from .pieces import Setting
from .worker import ROOT, Skipped

GOLDEN = ROOT / "tests" / "golden"
LOGITS = 1e-4  # what any logit of a recorded model may differ by, in float32 (tests/model/test_parity.py)
VARIANTS = ("dense_tied", "heads_14_2", "sliding", "yarn", "moe", "moe_step_2")
PROMPTS = ("What is 27 + 58?", "Which is larger, 34 or 43?", "Repeat: strawberry jam", "hello")
NEW = 24


# ---------------------------------------------------------------------- right


def on_kernels(setting: Setting):
    """Every kind of layer on this device's kernels, no worse than the portable code on the host.

    A CPU has none; their interpreters take minutes for a model, which tests/model/test_decoder_on_accelerators.py has.
    """
    kinds = ["sliding"] if setting.small else list(accelerator_cases.KINDS)
    name = "xla" if setting.platform == "cpu" else setting.platform
    return {f"{kind} on {name}": functools.partial(_on_kernels, kind, name) for kind in kinds}


def _on_kernels(kind, implementation):
    dtype = jnp.float32 if implementation == "tpu" else jnp.bfloat16
    with host():
        plain = accelerator_cases.results(kind, dtype, "xla")
        exact = accelerator_cases.results(kind, jnp.float32, "reference")
    got = accelerator_cases.results(kind, dtype, implementation)
    floor = BFLOAT16 if dtype == jnp.bfloat16 else 1e-5
    leaves = zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True)
    return {"of tolerance": max(assert_no_worse(*arrays, floor=floor) for arrays in leaves)}


def goldens(setting: Setting):
    """transformers' logits, recorded by tests/golden/make.py."""
    variants = VARIANTS[:1] if setting.small else VARIANTS
    return {variant: functools.partial(_golden, variant) for variant in variants}


def _golden(variant):
    lm = qwen2_jax.load(str(GOLDEN / variant), dtype="float32")
    with np.load(GOLDEN / variant / "golden.npz") as recorded, jax.default_matmul_precision("highest"):
        error = np.abs(lm.logits(recorded["tokens"]) - recorded["logits"]).max()
    assert error <= LOGITS, f"a logit differs from transformers' by {error:.1e}; {LOGITS} is allowed"
    return {"of tolerance": float(error / LOGITS)}


def demo(setting: Setting):
    """The bundled model: answers and logits of the host, computed there by a process of its own."""
    return {"greedy tokens": _demo_tokens, "int8 logits": _demo_int8}


def demo_answers():
    """{prompt: greedy token ids}, float32."""
    lm = qwen2_jax.load("demo", dtype="float32")
    ask = lambda text: lm.chat([{"role": "user", "content": text}], temperature=0, max_new_tokens=NEW)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        return {text: np.array(ask(text).token_ids) for text in PROMPTS}


def demo_logits(dtype):
    lm = qwen2_jax.load("demo", dtype=dtype)
    with jax.default_matmul_precision("highest"):
        return lm.logits([lm.tokenizer.encode(" ".join(PROMPTS))])


def demo_numbers():
    """What both cases compare with."""
    return demo_answers() | {dtype: demo_logits(dtype) for dtype in ("int8", "float32")}


def _demo_tokens():
    theirs = on_host("models.demo_numbers")
    for text, ours in demo_answers().items():
        assert ours.tolist() == theirs[text].tolist(), f"{text!r}: {ours.tolist()}, on the CPU {theirs[text].tolist()}"
    return {"prompts": len(PROMPTS), "tokens": sum(len(theirs[text]) for text in PROMPTS)}


def _demo_int8():
    theirs = on_host("models.demo_numbers")
    share = assert_no_worse(demo_logits("int8"), theirs["int8"], theirs["float32"], floor=BFLOAT16)
    return {"of tolerance": share}


@functools.cache
def on_host(function, *arguments):
    """What a function of this folder, "module.name", returns in a process that has only the CPU: {name: array}."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.npz"
        command = [sys.executable, "-m", "benchmarks.device.host", str(file), function, *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{function} failed on the host: {ended.stderr[-1000:]}")
        with np.load(file) as arrays:
            return dict(arrays)


# ---------------------------------------------------------------------- speed


def random_params(config: ModelConfig):
    """bfloat16 weights for decoding, one array per layer; a program per shape makes them."""
    make = functools.cache(lambda shape: jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, jnp.bfloat16)))
    tree: dict = {}
    for number, (path, spec) in enumerate(params.leaves(model.declare(config, unroll=True)[1])):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = make(spec.shape)(jax.random.key(number)) if spec.decay else jnp.ones(spec.shape, jnp.bfloat16)
    return tree


@functools.cache
def random_lm(name: str, small: bool, dual_chunk: DualChunk | None = None) -> LM:
    config = accelerator_cases.DENSE if small else PRESETS[name]
    config = dataclasses.replace(config, dual_chunk_attention_config=dual_chunk)
    stats = jax.devices()[0].memory_stats() or {}
    need, have = 2.2 * flops.parameters(config), stats.get("bytes_limit", float("inf"))
    if need > have:
        raise Skipped(f"{name} needs {need / 2**30:.0f} GiB, this device has {have / 2**30:.0f}")
    return LM(config, random_params(config), dtype="bfloat16", unroll=True)


def chip():
    """The row of this device in qwen2_jax.parallel.chips, or None."""
    kind = jax.devices()[0].device_kind
    return next((chip for chip in chips.CHIPS.values() if chips.peak_of(chip.kind) == chips.peak_of(kind)), None)


def share(amount, seconds, peak):
    """amount / seconds as a share of peak; None where the device has no known peak."""
    return None if peak is None else amount / seconds / peak


def requests(config, rows, length, new):
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length))
    settings = SamplingParams(max_new_tokens=new, ignore_eos=True)
    return [Request(tuple(row), settings) for row in ids.tolist()]


def prefill(name, setting, length):
    """From token ids to the first new token of one prompt."""
    lm = random_lm(name, setting.small)
    seconds = _prefill_seconds(lm, length, "auto")
    work = flops.forward_flops(lm.config, length) - 2 * (length - 1) * flops.head_parameters(lm.config)
    peak = chip() and chip().peak.tflops * 1e12
    return {"tokens/s": length / seconds, "ms": 1e3 * seconds, "MFU": share(work, seconds, peak)}


def _prefill_seconds(lm, length, long_context, repeat=3):
    """The fastest of `repeat` runs, after one that compiles."""
    asked = requests(lm.config, 1, length, 1)
    lm.generator.run(asked, long_context)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        lm.generator.run(asked, long_context)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def decoding(name, setting, rows, length, floor=None):
    """Greedy tokens of all rows together, behind prompts of `length` tokens, in calls of sixteen steps."""
    lm = random_lm(name, setting.small)
    calls = 2 if setting.small else 6
    asked = requests(lm.config, rows, length, 16 * (calls + 1))
    started = lm.generator.start([lm.generator.check(request) for request in asked])
    started.advance()
    start = time.perf_counter()
    for _ in range(calls):
        started.advance()
    seconds = (time.perf_counter() - start) / (16 * calls)
    weights = flops.matrix_parameters(lm.config)  # each is read once a step, the embedding only where it is the head
    moved = 2 * weights + rows * (length + 8 * calls) * flops.kv_bytes_per_token(lm.config)
    used = share(moved, seconds, chip() and chip().hbm_gb_s * 1e9)
    numbers = {"tokens/s": rows / seconds, "ms": 1e3 * seconds, "of bandwidth": used}
    return numbers | ({"floor": floor} if floor and chip() and chip().name in ("h100", "h200") else {})


def speeds(name, floor, setting: Setting):
    if setting.small and name != "qwen2-7b":
        return {}  # at tiny shapes all models are one
    length = 40 if setting.small else 4096
    found = {"prefill 4k": functools.partial(prefill, name, setting, length)}
    for rows in (1,) if setting.small else (1, 64, 8):
        here = floor if rows == 1 else None
        found[f"decode at 4k, rows: {rows}"] = functools.partial(decoding, name, setting, rows, length, here)
    return found


speed_7b = functools.partial(speeds, "qwen2-7b", "70% of bandwidth")
speed_half_b = functools.partial(speeds, "qwen2-0.5b", "500 tokens/s")


def speed_long(setting: Setting):
    """Prefill with Dual Chunk Attention in five chunks beside plain causal attention of the same length."""

    def compare():
        chunk = DualChunk(chunk_size=48, local_size=8) if setting.small else DualChunk(chunk_size=8192, local_size=1024)
        lm, length = random_lm("qwen2-0.5b", setting.small, chunk), 100 if setting.small else 32000
        plain, chunked = (_prefill_seconds(lm, length, mode, repeat=2) for mode in ("off", "dca"))
        return {"tokens/s": length / chunked, "plain causal, tokens/s": length / plain, "DCA / plain": chunked / plain}

    return {"prefill 32k with dual chunks": compare}
