# SPDX-License-Identifier: Apache-2.0
"""Memory and work of post-training stages besides a training step: a reference model, and sampling."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.infer.engine import lowering
from qwen2_jax.infer.engine.programs import Generator
from qwen2_jax.model import decoder, head_padding
from qwen2_jax.parallel import sharding
from qwen2_jax.plan.infer import decode_part
from qwen2_jax.plan.machine import Machine
from qwen2_jax.plan.program import compiled, device_bytes
from qwen2_jax.plan.report import Part
from qwen2_jax.plan.shapes import shapes
from qwen2_jax.train.config import Run
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.stage import stage_of
from qwen2_jax.weights.params import Tree

# A plan has no data: a fixed number of groups per row is assumed, each with a fixed number of responses. Only sums over
# a row's groups depend on it, a small part of a step.
GROUPS, RESPONSES = 16, 6


def beside(run: Run, specs: Tree, mesh: Mesh) -> dict[str, int]:
    """Bytes on a device, by name, that are there during a step without being its arguments.

    The reference's weights, unless they are those below adapters, or its log-probabilities were computed ahead. A
    judging reward model is left out: it is another checkpoint, of any size.
    """
    return {"reference": copy(run, specs, mesh)} if stage_of(run).holds_reference else {}


def copy(run: Run, specs: Tree, mesh: Mesh) -> int:
    """Bytes on a device of the weights in the run's dtype."""
    return device_bytes(shapes(specs, mesh, jnp.dtype(run.dtype)))


def sampling(run: Online, config: ModelConfig, where: Machine, mesh: Mesh, held: dict[str, int]) -> Part:
    """An episode's answers, all as long as they may be: the decoding program, compiled, times the tokens.

    Prefills are left out. held: bytes that stay on a device meanwhile, by name: the training's state, the reference.
    """
    rows = min(run.sampling.rows, run.prompts * run.sampling.samples)
    wider = head_padding.spread(config, mesh)
    served = config if wider is None else wider.config
    graphdef, specs = decoder.declare(served)
    params = shapes(specs, mesh, jnp.dtype(run.dtype), sharding.SERVING)
    generator = Generator(
        graphdef, params, served, dtype=jnp.dtype(run.dtype), mesh=mesh, implementation=run.implementation
    )
    batches = -(-run.prompts * run.sampling.samples // rows)
    lower: Any = lambda: lowering.lower_decode(generator, rows, run.longest, run.long_context)  # noqa: E731
    axes = "" if run.sampling.mesh is None else " on " + ", ".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1)
    program = compiled(f"sampling, {rows} answers at a time{axes}", lower, mesh)
    part = decode_part(
        served, where, mesh, program, rows=rows, length=run.longest, slots=run.longest, params=params,
        steps=batches * run.sampling.max_new_tokens,
    )  # fmt: skip
    arguments = {**program.arguments, **held}
    return dataclasses.replace(part, program=dataclasses.replace(program, arguments=arguments))
