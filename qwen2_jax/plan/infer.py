# SPDX-License-Identifier: Apache-2.0
"""The plan of inference: a prefill chunk and a decoding step, compiled for the target machine."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine import lowering
from qwen2_jax.infer.engine.buckets import Buckets, context_limit
from qwen2_jax.infer.engine.programs import Generator
from qwen2_jax.model import decoder, flops, head_padding, rope
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import architecture, device_work, machine, roofline
from qwen2_jax.plan.program import Program, compiled, device_bytes
from qwen2_jax.plan.report import GIB, Part, Plan
from qwen2_jax.plan.shapes import form_shapes
from qwen2_jax.train.step import shardings_of
from qwen2_jax.weights.forms import FORMS, array_dtype, nbytes
from qwen2_jax.weights.params import Tree

CHUNKS = (128, 512, 2048)  # of a prefill, as Buckets.of chooses on accelerators


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceJob:
    """An inference workload. context: tokens of prompt and completion together in each row; None: 4,096, or the
    model's limit. cache_dtype: of keys and values; None: that of the activations. mesh: sizes of axes; None lets
    default_mesh choose."""

    context: int | None = None
    rows: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    long_context: rope.LongContext = "auto"
    mesh: Mapping[str, int] | None = None
    implementation: str | None = None


def plan(checkpoint: str, name: str, job: InferenceJob) -> Plan:
    """Compiles prefill and decoding of a checkpoint's architecture for the machine called `name`.

    checkpoint: as architecture.named; no weights are needed. Raises UserError for what contradicts itself, and where
    the machine's compiler is not installed.
    """
    where = machine.parse(name)
    config = architecture.named(checkpoint)
    limit = context_limit(config, job.long_context)
    context = min(4096, limit) if job.context is None else job.context
    if not 2 <= context <= limit:
        raise UserError(
            f"--context is {context}; {checkpoint} takes 2 to {limit} tokens (--long-context {job.long_context})"
        )
    if job.rows < 1:
        raise UserError(f"--batch is {job.rows}; give 1 or more rows")
    chosen = default_mesh(config, where.devices) if job.mesh is None else sizes(job.mesh, where.devices)
    mesh = machine.mesh_of(where, chosen)
    generator = make_generator(config, mesh, job)
    buckets = generator.buckets
    rows, length = buckets.batch(job.rows), buckets.length(context)
    chunk = buckets.cut(context - 1)[0]
    shape = (rows, length, job.long_context)
    prefill = compiled(
        f"prefill, {rows} x {chunk:,} tokens", lambda: lowering.lower_prefill(generator, chunk, *shape), mesh
    )
    decode = compiled(f"decoding step, {rows} rows", lambda: lowering.lower_decode(generator, *shape), mesh)
    common: Any = {"rows": rows, "length": context, "slots": length, "params": generator.params}
    parts = (
        _prefill(config, where, mesh, prefill, chunk=chunk, **common),
        decode_part(config, where, mesh, decode, **common),
    )
    settings = {
        "context": context,
        "rows": rows,
        "cache slots": length,
        "dtype": job.dtype,
        "cache dtype": job.cache_dtype or array_dtype(job.dtype),
        "long_context": job.long_context,
    }
    whole = Plan(f"{checkpoint}, inference", where, dict(mesh.shape), settings, parts)
    return whole if whole.fits else dataclasses.replace(whole, advice=tuple(advice(config, whole, job, rows, context)))


def default_mesh(config: ModelConfig, devices: int) -> dict[str, int]:
    """The largest tensor axis that the model's dimensions allow, then an expert axis, then fsdp for the remaining
    devices.

    Inside a layer the first two cost one sum over the devices; fsdp moves weights over the links at each token.
    """
    _, specs = decoder.declare(config)
    for tensor in (n for n in range(devices, 0, -1) if devices % n == 0):
        left = devices // tensor
        expert = math.gcd(left, config.num_experts) if config.num_experts else 1
        found = sizes({"fsdp": left // expert, "expert": expert, "tensor": tensor}, devices)
        try:
            abstract = AbstractMesh(tuple(found.values()), tuple(found))
            shardings_of(specs, abstract, sharding.SERVING)  # type: ignore[arg-type]  # shapes need no devices
        except UserError:
            continue
        return found
    raise UserError(f"no mesh of {devices} devices cuts this model; give one with --mesh")


def sizes(asked: Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of all axes: 1 for those not given; -1 takes the remaining devices."""
    if unknown := set(asked) - set(sharding.AXES):
        raise UserError(f"--mesh has no axis {', '.join(sorted(unknown))}; axes are {', '.join(sharding.AXES)}")
    given = sharding.filled(asked, devices)
    return {axis: given.get(axis, 1) for axis in sharding.AXES}


def make_generator(config: ModelConfig, mesh: Mesh, job: InferenceJob) -> Generator:
    """The generator as load() makes it, with shapes for parameters."""
    dtype = jnp.dtype(array_dtype(job.dtype))
    if (wider := head_padding.spread(config, mesh)) is not None:
        config = wider.config
    graphdef, specs = decoder.declare(config, dtype=dtype, unroll=True)
    params = form_shapes(specs, mesh, job.dtype, sharding.SERVING)
    buckets = Buckets(rows=1, chunks=CHUNKS, limit=max(context_limit(config, mode) for mode in rope.MODES))
    return Generator(
        graphdef, params, config, dtype=jnp.dtype(job.cache_dtype or dtype), unroll=True, mesh=mesh, buckets=buckets,
        implementation=job.implementation,
    )  # fmt: skip


def _prefill(
    config, where, mesh, program: Program, *, rows: int, length: int, slots: int, chunk: int, params: Tree
) -> Part:
    """All chunks of a prompt that fills the context."""
    cut, chunks = (
        device_work.cached(device_work.parts(config, mesh, rows), mesh, slots=slots, tokens=chunk),
        math.ceil(length / chunk),
    )
    weights, cache = device_bytes(params), program.arguments["cache"]
    work = device_work.prefill_work(
        config, where.chip, cut, rows=rows, length=length, chunk=chunk, weight_bytes=weights, cache_bytes=cache
    )
    head = 2 * length * flops.head_parameters(config)  # forward_flops has all logits, a prefill none
    operations = rows * (flops.forward_flops(config, length) - head)
    traffic = roofline.traffic(program.collectives, where, mesh)
    if not program.known:
        return Part(program, {}, operations, None, traffic, {}, chunks)
    seconds = roofline.Seconds(work.compute, work.memory, chunks * sum(row.seconds for row in traffic))
    rates = {
        "seconds to the first token": (seconds.exposed, seconds.hidden),
        "prompt tokens/s": (rows * length / seconds.exposed, rows * length / seconds.hidden),
    }
    return Part(program, {}, operations, seconds, traffic, rates, chunks)


def decode_part(
    config, where, mesh, program: Program, *, rows: int, length: int, slots: int, params: Tree, steps: int = 1
) -> Part:
    """`steps` tokens for every row, with full caches."""
    experts = device_bytes(_experts(params))
    cut = device_work.parts(config, mesh, rows)
    work = device_work.decode_work(
        config, where.chip, device_work.cached(cut, mesh, slots=slots), rows=rows, length=length,
        weight_bytes=device_bytes(params) - experts, expert_bytes=experts, cache_bytes=program.arguments["cache"],
    )  # fmt: skip
    operations = steps * rows * (flops.forward_flops(config, length) - flops.forward_flops(config, length - 1))
    traffic = roofline.traffic(program.collectives, where, mesh)
    if not program.known:
        return Part(program, {}, operations, None, traffic, {}, steps)
    messages = steps * sum(row.seconds for row in traffic)
    seconds = roofline.Seconds(steps * work.compute, steps * work.memory, messages)
    # The next token depends on the last one's messages: nothing hides them.
    rates = {
        "tokens/s of a row": (steps / seconds.exposed, steps / seconds.hidden),
        "tokens/s of all": (steps * rows / seconds.exposed, steps * rows / seconds.hidden),
    }
    return Part(program, {}, operations, seconds, traffic, rates, steps)


def _experts(params: Tree) -> list[Any]:
    """The routed experts' arrays: those with a dimension for experts before two others."""
    found = []
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            found += _experts(leaf)
        elif name in ("gate_EFD", "up_EFD", "down_EDF"):
            found.append(leaf)
    return found


def advice(config: ModelConfig, made: Plan, job: InferenceJob, rows: int, context: int) -> list[str]:
    """Changes that would make both programs fit, judged by formula from what they need now."""
    weights, cache = (max(part.program.arguments[kind] for part in made.parts) for kind in ("parameters", "cache"))
    room = made.limit - (made.needed - cache)
    found = []
    if room > 0:
        if (most := int(rows * room / cache)) >= 1:
            found.append(f"--batch {2 ** int(math.log2(most))} at this context fits")
        if (shorter := int(context * room / cache) // 256 * 256) >= 256:
            found.append(f"--context {shorter} with --batch {job.rows} fits")
    now = nbytes(specs := decoder.declare(config)[1], job.dtype)
    for smaller in FORMS:
        share = nbytes(specs, smaller) / now
        if share < 1:
            after = made.needed - weights * (1 - share)
            verdict = "fits" if after <= made.limit else "is not enough alone"
            found.append(f"--dtype {smaller} {verdict}: about {after / GIB:.1f} GiB per device")
    if (kept := job.cache_dtype or array_dtype(job.dtype)) != "int8":
        small, large = (flops.kv_bytes_per_token(config, jnp.dtype(name).itemsize) for name in ("int8", kept))
        after = made.needed - cache * (1 - small / large)
        verdict = "fits" if after <= made.limit else "is not enough alone"
        found.append(f"--cache-dtype int8 {verdict}: about {after / GIB:.1f} GiB per device")
    multiples = (2, 4, 8, 16)
    for more in multiples:
        tensor = default_mesh(config, made.machine.devices * more)["tensor"]
        heads = math.gcd(tensor, config.num_key_value_heads) / math.gcd(made.mesh["tensor"], config.num_key_value_heads)
        after = weights / more + (made.needed - weights) / max(heads, 1)
        if after <= made.limit:
            found.append(f"{more} times as many devices fit: about {after / GIB:.1f} GiB per device")
            break
    else:
        # By default devices cut a row's cache by its key heads, of which there are few; slots there are many.
        for more in multiples:
            after = made.needed - cache + cache / more
            if after <= made.limit:
                mesh = dict(made.mesh) | {"context": more * made.mesh.get("context", 1)}
                axes = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
                found.append(
                    f"{more} times as many devices with --mesh {axes} fit: about {after / GIB:.1f} GiB per device"
                )
                break
    return found
