# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, metrics, checkpoints, evaluation, and the export of the result."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import peft
from qwen2_jax.data import left_out
from qwen2_jax.data.spec import Data
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.errors import UserError
from qwen2_jax.model import flops, lora
from qwen2_jax.observe import Recorder, plots
from qwen2_jax.parallel.hosts import Group
from qwen2_jax.train import dry_run, initial_state
from qwen2_jax.train.config import Run
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.prepare import prepare
from qwen2_jax.train.result_folders import results
from qwen2_jax.train.stage import OpenedStage, stage_of
from qwen2_jax.train.state.checkpoints import Checkpoints
from qwen2_jax.train.state.fingerprint import digest
from qwen2_jax.train.state.lock import alone
from qwen2_jax.train.state.preemption import Preemption
from qwen2_jax.train.step import State, Trainer, abstract, shardings_of
from qwen2_jax.weights.forms import array_dtype, form_of
from qwen2_jax.weights.params import Tree, count, is_spec


def run(config: Run, console: Console | None = None, *, group: Group | None = None) -> Path | None:
    """Trains a configuration, from the beginning or from the last checkpoint in its folder.

    group: the processes that train together, default this one alone; all of them call this, on one shared folder.
    Returns the folder with the result: config.out / "hf", or "adapter" where that is all. None when a signal asked to
    stop before the end: the state is then saved, and the same configuration continues.
    """
    console, group = console or Console(stderr=True), group or Group()
    group.at("reading the data", no_time_limit=True)
    job = prepare(config, console)
    trainer = Trainer(config, job.config, job.steps, mesh=job.mesh, objective=stage_of(config).objective_of(job))
    if config.dry_run:
        _print_dry_run(job, trainer, console)
        return None
    with alone(config.out):
        return _run(job, trainer, console, group)


def _run(job: TrainingJob, trainer: Trainer, console: Console, group: Group) -> Path | None:
    config = job.run
    group.at("loading weights or a checkpoint")
    if jax.process_index() == 0:
        job.write_small_files()
    _print_left_out(job, console)
    if not plots.available():
        console.print(f"note: {plots.MISSING}; {config.out / 'curves.png'} will not be drawn", soft_wrap=True)
    cost = partial(flops.train_flops, job.config, frozen=config.lora is not None)
    recorder = Recorder(
        config.log, config.out, total=job.steps, cost=cost, about=dataclasses.asdict(config), console=console
    )
    if config.start is not None and job.source is not None:
        name, source = config.start.checkpoint, job.source
        found = [peft.quantised_base(name, source, adapters=config.lora is not None)]
        if config.start.adapter is not None:
            found.append(peft.other_base(config.start.adapter, name, source))
        for warning in filter(None, found):
            console.print(f"warning: {warning}", soft_wrap=True)
    begin, frozen = initial_state.weights(job, trainer)
    console.print(
        f"{count(trainer.model_specs) / 1e6:,.2f} M parameters"
        + (f", {count(trainer.specs) / 1e6:,.2f} M of them in adapters trained" if config.lora else "")
        + f", {job.steps} steps of {config.rows} x {config.length} tokens, run folder {config.out}",
        soft_wrap=True,
    )
    # Adapters belong to the weights below them. Without adapters the state has all weights, and another start is only
    # reported.
    identity = job.identity if frozen is None else job.identity | {"base": digest(frozen)}
    saved = Checkpoints(
        config.out / "checkpoints",
        config.checkpoints,
        identity=identity,
        meanings=job.meanings,
        settings=job.settings,
        console=console,
    )
    with Preemption() as stop, saved, recorder:
        if not config.resume:
            saved.start_over(config.out / "metrics.jsonl")
            recorder.start_over()
        restored = saved.restore(trainer.abstract) if config.resume else None
        if restored is None:
            done, state, about = 0, begin(), dict[str, Any]()
        else:
            done, state, about = restored
            console.print(_where_it_goes_on(job, done), soft_wrap=True)
        del begin, restored  # and the arrays they hold: the first step donates the state's buffers
        recorder.start(done, about.get("recorder"))
        if 0 < done < job.steps and saved.export_due(done) and _lost(config, done):
            with recorder.goodput("save"):
                export(job, trainer, state, frozen, config.out / f"hf-{done}", console)
        with stage_of(config).open(job, trainer, done, frozen, about.get("feed") or {}, console) as parts:
            state, done = _train(job, trainer, parts, state, done, frozen, saved, recorder, stop, group)
        if done < job.steps:
            again = "the same command" if config.resume else "the same command without --no-resume"
            console.print(f"stopped after step {done}, which is saved; resume with {again}", soft_wrap=True)
            return None
    group.at("writing the result")
    folder = export(job, trainer, state, frozen, config.out / "hf", console)
    if jax.process_index() == 0:
        _draw(config, console)
    console.print(f"wrote {folder}", soft_wrap=True)
    if (other := config.out / "hf") != folder and other.exists():
        console.print(f"warning: {other} is the result of an earlier run, not of this one", soft_wrap=True)
    return folder


def _where_it_goes_on(job: TrainingJob, done: int) -> str:
    """The line that says where the run continues. Raises UserError if it ends before the checkpoint's step, `done`."""
    more = "--steps" if job.run.epochs is None else "--epochs"
    if done > job.steps:
        raise UserError(
            f"the checkpoint in {job.run.out} is the state after step {done}, and this run has {job.steps} steps: it "
            f"cannot go back. Raise {more}, or give another --out or --no-resume to start over"
        )
    if done == job.steps:
        return f"this run is finished; nothing is trained: raise {more}, or start over with --no-resume"
    return f"continuing after step {done}"


def _lost(config: Run, step: int) -> bool:
    """Whether a kill may have prevented the export of this step, which follows its checkpoint."""
    # Several processes may see a shared folder differently but must all do the same: they always write it again.
    return jax.process_count() > 1 or not all(path.exists() for path in results(config, config.out / f"hf-{step}"))


def _print_dry_run(job: TrainingJob, trainer: Trainer, console: Console) -> None:
    """Prints the report of --dry-run."""
    run = job.run
    batch = stage_of(run).first_batch(job, trainer.place.host)
    data, epochs = job.data, list[tuple[str, float]]()
    if isinstance(data, Loaded) and isinstance(run.data, Data):
        epochs = [*zip((s.path for s in run.data.sources), data.epochs(job.steps, run.rows), strict=True)]
    specs, shardings = trainer.model_specs, job.mesh and shardings_of(trainer.model_specs, job.mesh)
    dtype = jnp.dtype(array_dtype(run.lora_base))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract(specs))
    if shardings:
        frozen = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), frozen, shardings)
    if form := form_of(run.lora_base, only_layers=True):
        frozen = jax.tree.map(lambda spec, x: form.shape(x, spec), specs, frozen, is_leaf=is_spec)
    dry_run.report(
        job.config,
        trained=trainer.abstract.params,
        optimizer=trainer.abstract.optimizer,
        ema=trainer.abstract.ema,
        frozen=None if run.lora is None else frozen,
        batch=batch,
        tokenizer=job.tokenizer,
        console=console,
        rows=run.rows,
        steps=job.steps,
        accumulate=run.accumulate,
        row_parts=job.row_parts,
        dtype=run.dtype,
        remat=run.remat,
        sources=_sources(job),
        ranks=data.ranks if isinstance(data, Loaded) else 1,
        epochs=epochs,
    )


def _sources(job: TrainingJob) -> list[dict[str, Any]]:
    """What every source holds and what is left out of it, of training and of held-out data: rows of a table."""
    held_out = (found for data in job.held_out.values() for found in data.report())
    return [*job.data.report(), *(found | {"source": f"{found['source']} (held out)"} for found in held_out)]


def _print_left_out(job: TrainingJob, console: Console) -> None:
    """Prints a line for each source, of training or held-out data, with records that are left out or cut."""
    for data in (job.data, *job.held_out.values()):
        for line in left_out.lines(data.report()):
            console.print(line, soft_wrap=True)


def _train(
    job: TrainingJob,
    trainer: Trainer,
    parts: OpenedStage,
    state: State,
    done: int,
    frozen,
    saved: Checkpoints,
    recorder,
    stop,
    group,
):
    """Trains until the end or a request to stop; returns the state, which is saved, and the number of steps done."""
    run, feed = job.run, parts.feed
    health = None

    def score() -> None:
        recorder.flush()
        group.at(f"evaluation after step {done}")
        with recorder.goodput("evaluation"):
            recorder.evaluation(done, parts.evaluator(state, frozen))

    if job.held_out and run.evaluation.first and not done:
        score()
    while done < job.steps:
        group.at(f"data of step {done + 1}")
        with recorder.goodput(feed.phase, behind=recorder.newest):
            batch, more = feed.next(done, state, frozen)
            placed = parts.complete(trainer.place(batch))
        group.at(f"step {done + 1}")
        with recorder.goodput("step"):
            state, metrics = trainer.step(state, placed, frozen)
        done += 1
        ratios = metrics["ratios"] | {name: (value, 1.0) for name, value in more.items()}
        recorder.step(done, metrics | {"ratios": ratios}, batch)
        # Checks the step before: its values have been computed already, so the device does not wait.
        _check(run, health, done - 1, saved, recorder)
        health = metrics["skipped_in_a_row"]
        last, leave = done == job.steps, stop.requested(done)
        if job.held_out and not leave and (last or done % run.evaluation.every == 0):
            score()
        if last or leave or saved.due(done):
            _check(run, health, done, saved, recorder)
            group.at(f"saving step {done}")
            with recorder.goodput("save"):
                saved.save(done, state, {"recorder": recorder.state(), "feed": feed.kept(done)})
        if leave:  # a request to stop waits only for the save
            break
        if not last and saved.export_due(done):
            recorder.flush()
            group.at(f"exporting step {done}")
            with recorder.goodput("save"):
                export(job, trainer, state, frozen, run.out / f"hf-{done}")
    with recorder.goodput("save"):
        saved.wait()
    return state, done


def _check(run: Run, in_a_row: jax.Array | None, step: int, saved: Checkpoints, recorder: Recorder) -> None:
    """Raises UserError after `guard.patience` skipped steps in a row."""
    if in_a_row is not None and int(in_a_row) >= run.guard.patience:
        recorder.flush()
        kept = saved.steps()
        raise UserError(
            f"{int(in_a_row)} steps in a row were skipped, the last is step {step}: their batches had no targets"
            + (" (no answer got a reward, or none a better one than another)" if isinstance(run, Online) else "")
            + ", or their loss or gradient was not finite"
            + (f", or lay {run.guard.spike} standard deviations above the recent ones" if run.guard.spike else "")
            + f". {run.out / 'metrics.jsonl'} has the numbers. "
            + (f"The checkpoint of step {kept[-1]} is intact" if kept else "No checkpoint was written")
            + "; lower optim.lr, look at the data of these steps, or raise guard.patience"
        )


def export(
    job: TrainingJob, trainer: Trainer, state: State, frozen: Tree | None, folder: Path, console: Console | None = None
) -> Path:
    """Writes the trained weights as a Hugging Face folder in place of an earlier one, and adapters as PEFT's files.

    Returns the last folder that it wrote. Where several processes train, all of them call it, each writes its share.
    """
    run = job.run
    made = results(run, folder)
    if run.lora is not None and run.start is not None:
        params = state.params if state.ema is None else state.ema
        base = None if job.source is None else peft.weights_sha256(job.source)
        name = run.start.checkpoint
        peft.save_peft(made[0], job.config, params, run.lora, name, base_sha256=base, replace=True)
    if made[-1] == folder:
        config = stage_of(run).result_config(job)
        weights = trainer.weights(state, frozen)
        if run.lora is not None and frozen is not None and run.export_dtype != "float32" and console is not None:
            params = state.params if state.ema is None else state.ema
            changed = lora.share_changed(frozen, weights, params, run.export_dtype)
            console.print(
                f"rounded to {run.export_dtype}, {1 - changed:.0%} of the adapted numbers are the base's own again; "
                f"{made[0]} and an export with --export-dtype float32 lose nothing",
                soft_wrap=True,
            )
        checkpoint.save_hf(
            folder, config, weights, dtype=run.export_dtype, tokenizer_files_from=job.files, replace=True
        )
    return made[-1]


def _draw(config: Run, console: Console) -> None:
    if not plots.available():  # reported before the first step
        return
    try:
        plots.draw(config.out / "metrics.jsonl", config.out / "curves.png")
    except UserError as reason:  # a run does not fail because its curves could not be drawn
        console.print(f"no curves: {reason}", soft_wrap=True)
