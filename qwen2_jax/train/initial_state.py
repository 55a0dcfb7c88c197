# SPDX-License-Identifier: Apache-2.0
"""The weights that a run begins with."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from qwen2_jax.checkpoint import peft
from qwen2_jax.errors import UserError
from qwen2_jax.model import lora
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.optim import online_merging
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree


def weights(job: TrainingJob, trainer: Trainer) -> tuple[Callable[[], State], Tree | None]:
    """(function that creates the first state, frozen weights under adapters or None)."""
    run = job.run
    if job.source is None:
        return trainer.init, None
    dtype = "float32" if run.lora is None else run.lora_base
    load = partial(stage_of(run).load, job, dtype)
    if run.optim.merging is not None:
        return lambda: merging_from(job, trainer, load()), None
    if run.lora is None:
        return lambda: trainer.init(load()), None
    made = adapters(job)
    frozen = load()
    return lambda: trainer.init(made()), frozen


def merging_from(job: TrainingJob, trainer: Trainer, first: Tree) -> State:
    """The first state of a run with online merging: these weights, which are donated, and the task vector."""
    assert job.run.optim.merging is not None
    tau = online_merging.load_tau(job.run.optim.merging, trainer.specs, job.config, first, job.mesh, seed=job.run.seed)
    return online_merging.with_tau(trainer.init(first), tau)


def adapters(job: TrainingJob) -> Callable[[], Tree]:
    """A function that returns the adapters to train: new ones, or those of start.adapter."""
    run = job.run
    assert run.lora is not None
    assert run.start is not None
    if run.start.adapter is None:
        make = jax.jit(partial(lora.init, job.config, run.lora))
        return lambda: make(jax.random.key(run.seed))
    settings, found = peft.load_peft(run.start.adapter, job.config, mesh=job.mesh)
    # A folder may name its modules in full or in part, so the modules are compared, not the names.
    meant = [dataclasses.replace(s, targets=lora.all_modules(job.config, s)) for s in (settings, run.lora)]
    if meant[0] != meant[1]:
        raise UserError(f"start.adapter {run.start.adapter} is of {settings}, and the run asks for {run.lora}")
    return lambda: found
