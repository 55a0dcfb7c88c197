# SPDX-License-Identifier: Apache-2.0
"""The reference model that a policy is compared with: the weights that the run starts from."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from qwen2_jax.console import progress_bar
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import empty_row, stack
from qwen2_jax.data.tokens.packing_plan import Rows
from qwen2_jax.errors import UserError
from qwen2_jax.model import lora
from qwen2_jax.train import initial_state
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.state.fingerprint import digest
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree

ABOUT = "about.json"


def weights(job: TrainingJob, trainer: Trainer, frozen: Tree | None) -> Tree:
    """The weights that the run starts from, in the step's dtype. With adapters, the frozen weights are not copied."""
    run = job.run
    if frozen is None:
        return jax.jit(lambda params: trainer.compute(params, None))(stage_of(run).load(job, "float32"))
    if run.lora is None or run.start is None or run.start.adapter is None:
        return frozen  # new adapters change nothing before they are trained
    return lora.attach(frozen, initial_state.adapters(job)(), run.lora)


def cached(job: TrainingJob, trainer: Trainer, done: int, frozen: Tree | None, console: Console) -> TrainingJob:
    """The job with rows that carry reference_BT: computed once for all of them, and kept in the run's folder.

    Existing files are used again if they are of the same rows, weights and settings; a run that continues (done > 0)
    assumes that the weights are the same, and does not load them again. Raises UserError where several processes train:
    each has part of the rows only.
    """
    if jax.process_count() > 1:
        raise UserError("reference 'cached' is for one process; give --reference live where several train together")
    assert isinstance(job.data, Loaded)
    held_out = {name: data for name, data in job.held_out.items() if isinstance(data, Loaded)}
    settings = {name: getattr(job.run, name) for name in ("length", "dtype", "long_context")}
    reference = None if done else weights(job, trainer, frozen)
    known = None if reference is None else digest(reference)
    found = {}
    for name, data in {"": job.data, **held_out}.items():
        folder = job.run.out / "reference" / (name or "data")
        stored = _about(folder)
        about = {"tokens": data.identity, "rows": [len(plan) for plan in data.plans], **settings}
        about["weights"] = known or stored.get("weights")
        if stored != about:
            reference = weights(job, trainer, frozen) if reference is None else reference
            about["weights"] = digest(reference)
            _write(folder, data.plans, trainer, reference, job, console, about)
        found[name] = data.with_reference([_open(folder, i, plan, "r") for i, plan in enumerate(data.plans)])
    return dataclasses.replace(job, data=found.pop(""), held_out=dict(found))


def _write(
    folder: Path,
    plans: list[Rows],
    trainer: Trainer,
    reference: Tree,
    job: TrainingJob,
    console: Console,
    about: dict[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    rows = job.run.rows // job.run.accumulate
    total, done = sum(map(len, plans)), 0
    with progress_bar("log-probabilities of the reference", console, in_bytes=False) as progress:
        for i, plan in enumerate(plans):
            array = _open(folder, i, plan, "w+")
            for first in range(0, len(plan), rows):
                here = min(rows, len(plan) - first)
                batch = stack([plan[first + r] if r < here else empty_row(plan.length, plan.pad) for r in range(rows)])
                found_BT = trainer.place.back(trainer.logprobs(reference, trainer.place(batch)))
                array[first : first + here] = found_BT[:here]
                progress(done := done + here, total)
            array.flush()
    work = folder / (ABOUT + ".new")
    work.write_text(json.dumps(about) + "\n", "utf-8")
    os.replace(work, folder / ABOUT)  # its presence says that the arrays are complete


def _open(folder: Path, i: int, plan: Rows, mode: Any) -> np.memmap:
    return np.memmap(folder / f"{i}.f32", "<f4", mode, shape=(len(plan), plan.length))


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
