# SPDX-License-Identifier: Apache-2.0
"""The plan of a training run: its step, compiled for the target machine."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.model import flops
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import architecture, device_work, estimate, machine, online, roofline
from qwen2_jax.plan.program import Program, compiled, device_bytes
from qwen2_jax.plan.report import GIB, Part, Plan
from qwen2_jax.plan.shapes import form_shapes
from qwen2_jax.train.config import Run
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree, count

STATE = ("parameters", "optimizer", "average of the weights")  # what a step reads and writes once
STEPS = 1000  # of a schedule whose length depends on data that need not exist; it changes no shape


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run on a machine, before anything is compiled."""

    run: Run
    config: ModelConfig
    machine: machine.Machine
    mesh: Mesh
    trainer: Trainer

    @property
    def row_parts(self) -> int:
        """Number of parts that a batch's rows are split into."""
        return sharding.parts(sharding.axes_of("batch", self.mesh), self.mesh)

    @property
    def token_parts(self) -> int:
        """Number of parts that a batch's tokens are split into."""
        return self.row_parts * sharding.parts(sharding.axes_of("length", self.mesh), self.mesh)

    def setting(self, run: Run) -> estimate.Setting:
        """Another run on the same mesh, to be estimated."""
        return estimate.Setting(run, self.config, self.trainer.model_specs, self.machine, self.mesh)

    @property
    def batch(self) -> Batch:
        """Shapes of a batch with shardings."""
        dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
        dtypes = dtypes._replace(**dict.fromkeys(stage_of(self.run).extra_columns, jnp.float32))
        shape = (self.run.rows, self.run.length)
        place = sharding.sharding(("batch", "length"), shape, self.mesh)
        return jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place), dtypes)

    @property
    def frozen(self) -> Tree | None:
        """Shapes of the frozen weights below adapters, with shardings; None if all weights are trained."""
        if self.run.lora is None:
            return None
        return form_shapes(self.trainer.model_specs, self.mesh, self.run.lora_base, only_layers=True)


def plan(run: Run, name: str, path: Path | None = None) -> Plan:
    """Compiles the run's step for the machine called `name`. path: of the configuration, to find what it starts from.

    Neither data nor tokenizer nor checkpoint need to exist. Raises UserError for what contradicts itself, and where the
    machine's compiler is not installed.
    """
    job = prepare(run, name, path)
    program = compile_step(job)
    return describe(job, program)


def prepare(run: Run, name: str, path: Path | None = None) -> PlannedRun:
    """The run on a mesh of the machine's devices."""
    where = machine.parse(name)
    config = architecture.of_run(run, path)
    mesh = machine.mesh_of(where, run.mesh.sizes(where.devices))
    objective = stage_of(run).objective(groups=online.GROUPS, ranks=online.RESPONSES)
    trainer = Trainer(run, config, run.steps or STEPS, mesh=mesh, objective=objective)
    job = PlannedRun(run, config, where, mesh, trainer)
    if run.rows % (pieces := run.accumulate * job.row_parts):
        raise UserError(
            f"rows={run.rows} cannot be cut into {run.accumulate} micro-batches for {job.row_parts} parts of the mesh "
            f"({' x '.join(sharding.RULES['batch'])}) on {name}: choose rows as a multiple of {pieces}, a smaller "
            "accumulate, or more tensor or context"
        )
    return job


def compile_step(job: PlannedRun) -> Program:
    """The step as the training loop calls it, for the job's devices."""
    state, batch, frozen = job.trainer.abstract, job.batch, job.frozen
    kinds: dict[str, Any] = {
        "parameters": state.params,
        "optimizer": state.optimizer,
        "average of the weights": state.ema,
        "frozen weights": frozen,
        "batch and counters": (state.step, state.health, batch),
    }
    arguments = {kind: tree for kind, tree in kinds.items() if jax.tree.leaves(tree)}
    step = compiled("training step", lambda: (job.trainer.step.lower(state, batch, frozen), arguments), job.mesh)
    there = online.beside(job.run, job.trainer.model_specs, job.mesh)
    return dataclasses.replace(step, arguments={**step.arguments, **there})


def describe(job: PlannedRun, program: Program) -> Plan:
    """The plan from a compiled step: memory, time, advice."""
    run, config, mesh = job.run, job.config, job.mesh
    chip = job.machine.chip
    lengths = [run.length] * run.rows
    frozen = run.lora is not None
    operations = flops.train_flops(config, lengths, frozen=frozen)
    rows = roofline.traffic(program.collectives, job.machine, mesh)
    cut = device_work.parts(config, mesh, run.rows // run.accumulate, run.length)
    setting = job.setting(run)
    kept = setting.moved_per_token * run.rows * run.length / job.token_parts
    work = device_work.train_work(
        config, chip, cut, lengths=lengths, remat=run.remat, frozen=frozen, accumulate=run.accumulate,
        state_bytes=sum(program.arguments.get(kind, 0) for kind in STATE),
        weight_bytes=setting.met() * jnp.dtype(run.dtype).itemsize,
        kept_bytes=kept * jnp.dtype(run.dtype).itemsize,
    )  # fmt: skip
    seconds = None
    rates = {}
    if program.known:
        seconds = roofline.Seconds(work.compute, work.memory, sum(row.seconds for row in rows))
        best = operations / (chip.peak.tflops * 1e12 * job.machine.devices)
        tokens = run.rows * run.length
        rates = {
            "MFU": (best / seconds.exposed, best / seconds.hidden),
            "tokens/s": (tokens / seconds.exposed, tokens / seconds.hidden),
            "tokens/s per device": (
                tokens / seconds.exposed / job.machine.devices,
                tokens / seconds.hidden / job.machine.devices,
            ),
        }
    part = Part(program, within(job), operations, seconds, rows, rates)
    settings = {
        "rows": run.rows, "length": run.length, "accumulate": run.accumulate, "dtype": run.dtype, "remat": run.remat,
        "optimizer": run.optim.algorithm if run.optim.muon is None else "muon",
    } | ({"lora": f"rank {run.lora.rank} on {run.lora_base}"} if run.lora else {})  # fmt: skip
    title = (
        f"{count(job.trainer.model_specs) / 1e9:.2f} B parameters, training step of {run.rows * run.length:,} tokens"
    )
    parts = [part]
    if (episodes := stage_of(run).episodes) is not None:
        held = online.beside(run, job.trainer.model_specs, mesh)
        held["training's state"] = device_bytes(job.trainer.abstract) + device_bytes(job.frozen)
        if episodes.sampling.mesh is not None:
            mesh = machine.mesh_of(job.machine, episodes.sampling.mesh.sizes(job.machine.devices))
            held["weights as training has them"] = online.copy(run, job.trainer.model_specs, job.mesh)
        parts.append(online.sampling(episodes, config, job.machine, mesh, held))
    made = Plan(title, job.machine, dict(job.mesh.shape), settings, parts)
    return made if made.fits else dataclasses.replace(made, advice=tuple(advice(job, made)))


def within(job: PlannedRun) -> dict[str, int]:
    """Temporaries of a step whose size a formula gives: gradients, and the weights in the step's dtype.

    The gradients are in the copy's dtype; the sum over micro-batches is in float32. What is left of the compiler's
    temporaries are activations and buffers.
    """
    shards = device_bytes(job.trainer.abstract.params) // 4
    itemsize = jnp.dtype(job.run.dtype).itemsize
    sizes = {"gradients": shards * (itemsize if job.run.accumulate == 1 else 4 + itemsize)}
    if job.run.lora is None and itemsize < 4:
        sizes[f"weights in {job.run.dtype}"] = shards * itemsize
    return sizes


def advice(job: PlannedRun, made: Plan) -> list[str]:
    """Changes that would make the step fit: what the compiled one needs, and the difference between two estimates."""
    run, arguments = job.run, made.parts[0].program.arguments
    now = estimate.estimate(job.setting(run)).bytes
    most = run.rows // job.row_parts
    copies = job.mesh.shape.get("data", 1)
    changes: list[tuple[str, Run, str]] = []
    if run.remat != "full":
        changes.append(("--remat full", dataclasses.replace(run, remat="full"), "a third more arithmetic"))
    for pieces in (n for n in range(run.accumulate + 1, most + 1) if most % n == 0):
        changed = dataclasses.replace(run, accumulate=pieces)
        if pieces == most or estimate.estimate(job.setting(changed)).bytes - now + made.needed <= made.limit:
            changes.append((f"--accumulate {pieces}", changed, "more passes over weights and links"))
            break
    if run.optim.algorithm == "adamw" and run.optim.muon is None:
        optim = dataclasses.replace(run.optim, algorithm="adafactor")
        changes.append(("--optim.algorithm adafactor", dataclasses.replace(run, optim=optim), "another optimizer"))
    found = []
    for flag, changed, price in changes:
        after = made.needed + estimate.estimate(job.setting(changed)).bytes - now
        found.append((after, f"{flag} ({price})"))
    cheap = changes[: len(changes) - (run.optim.algorithm == "adamw" and run.optim.muon is None)]
    if len(cheap) > 1 and min(after for after, _ in found) > made.limit:
        both = dataclasses.replace(run, remat="full", accumulate=cheap[-1][1].accumulate)
        after = made.needed + estimate.estimate(job.setting(both)).bytes - now
        found.append((after, " and ".join(flag for flag, _, _ in cheap)))
    # Twice as many devices along fsdp halve the state, and the activations of a device's rows.
    state = sum(arguments.get(kind, 0) for kind in STATE) + sum(within(job).values())
    cut = state + estimate.activation_bytes(job.setting(run))
    if copies > 1:
        flag = f"--mesh.fsdp {job.mesh.shape['fsdp'] * copies} --mesh.data 1"
        found.append((made.needed - state * (1 - 1 / copies), f"{flag} (weights are gathered over more devices)"))
    more = 2
    while made.needed - cut * (1 - 1 / more) > made.limit and more < 64:
        more *= 2
    found.append((made.needed - cut * (1 - 1 / more), f"{more} times as many devices along fsdp"))
    words = {True: "fits", False: "is not enough alone"}
    found.sort(key=lambda change: change[0] > made.limit)
    return [f"{flag} {words[after <= made.limit]}: about {after / GIB:.1f} GiB per device" for after, flag in found]
