# SPDX-License-Identifier: Apache-2.0
"""The plans' formulas for machines and lengths too large to compile: the last two tables of docs/scaling.md.

    python benchmarks/on_paper.py

No step is compiled. The compilers of TPU and GPU must be installed: they report how the devices of a machine are
connected.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax.numpy as jnp

from qwen2_jax import PRESETS, model
from qwen2_jax.model import flops
from qwen2_jax.plan import architecture, device_work, machine
from qwen2_jax.plan.estimate import Setting, estimate
from qwen2_jax.plan.report import GIB
from qwen2_jax.plan.roofline import Seconds
from qwen2_jax.train import Mesh, config_file

ROOT = Path(__file__).parents[1]
SLICES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (4096, 16_384, 65_536, 262_144, 1_048_576)
TOKENS = 2**22  # of a training step
CHUNK = 2048  # of a prefill
PER = 1e6  # device seconds are given for this many tokens


def weak_scaling(name: str = "pretrain_72b", slice_: str = "v5p-256") -> Iterator[str]:
    """Rows of a table: the config's step, with as many times its rows as there are slices, a replica in each."""
    yield "| slices | devices | tokens a step | messages s | seconds a step | MFU |"
    yield "|---|---|---|---|---|---|"
    path = ROOT / f"configs/{name}.py"
    run = config_file.load(path)
    architect = architecture.of_run(run, path)
    specs = model.declare(architect)[1]
    for slices in SLICES:
        where = machine.parse(slice_ if slices == 1 else f"{slices}x{slice_}")
        wider = dataclasses.replace(run, rows=run.rows * slices, mesh=Mesh(replica=slices))
        mesh = machine.mesh_of(where, wider.mesh.sizes(where.devices))
        seconds = estimate(Setting(wider, architect, specs, where, mesh)).seconds
        best = flops.train_flops(architect, [run.length] * wider.rows) / (where.chip.peak.tflops * 1e12 * where.devices)
        yield (
            f"| {slices} | {where.devices:,} | {wider.rows * run.length:,} | {seconds.links:.2f} | {_span(seconds)} | "
            f"{best / seconds.exposed:.0%} to {best / seconds.hidden:.0%} |"
        )


def by_context(preset: str = "qwen2.5-7b-instruct-1m", name: str = "8xh100") -> Iterator[str]:
    """Rows of a table: device seconds of a million tokens of one model, by length of the rows."""
    yield "| context | GFLOPs a token, trained | training | mesh, GiB by formula | prefill | decoding, one row |"
    yield "|---|---|---|---|---|---|"
    where, architect = machine.parse(name), PRESETS[preset]
    specs = model.declare(architect)[1]
    base = config_file.load(ROOT / "configs/pretrain_7b.py")
    for length in CONTEXTS:
        best = None
        for context in (1, 2, 4, 8):
            rows = TOKENS // length
            parts = where.devices // context
            if rows % parts:
                continue
            run = dataclasses.replace(
                base, model=architect, rows=rows, length=length, accumulate=rows // parts, mesh=Mesh(context=context),
                long_context="off",
            )  # fmt: skip
            mesh = machine.mesh_of(where, run.mesh.sizes(where.devices))
            found = estimate(Setting(run, architect, specs, where, mesh))
            if found.bytes <= where.chip.usable_gib * GIB and (best is None or found.seconds.hidden < best[0]):
                best = found.seconds.hidden, f"context={context}, {found.bytes / GIB:.0f}"
        spent = where.devices * PER
        training = "-" if best is None else f"{best[0] * spent / TOKENS:,.0f}"
        serving = machine.mesh_of(where, Mesh(fsdp=1, tensor=8).sizes(where.devices))
        cut = device_work.parts(architect, serving, 1)
        weights = flops.parameters(architect) * jnp.dtype("bfloat16").itemsize // where.devices
        cache = 2 * flops.kv_bytes_per_token(architect) * length // where.devices  # 4 key heads on 8 devices: twice
        prefill = device_work.prefill_work(
            architect, where.chip, cut, rows=1, length=length, chunk=CHUNK, weight_bytes=weights, cache_bytes=cache
        )
        step = device_work.decode_work(
            architect, where.chip, cut, rows=1, length=length, weight_bytes=weights, expert_bytes=0, cache_bytes=cache
        )
        yield (
            f"| {length:,} | {flops.train_flops(architect, [length]) / length / 1e9:.0f} | {training} | "
            f"{best[1] if best else 'does not fit'} | {max(prefill) * spent / length:,.0f} | {max(step) * spent:,.0f} |"
        )


def _span(seconds: Seconds) -> str:
    return f"{seconds.hidden:.1f} to {seconds.exposed:.1f}"


if __name__ == "__main__":
    sys.stdout.write("\n".join([*weak_scaling(), "", *by_context()]) + "\n")
