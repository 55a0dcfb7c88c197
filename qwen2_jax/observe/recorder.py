# SPDX-License-Identifier: Apache-2.0
"""The recorder of a run: collects metrics and logs them without stalling the devices."""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from rich.console import Console

from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.model import flops
from qwen2_jax.observe.config import Logging
from qwen2_jax.observe.display import Display
from qwen2_jax.observe.goodput import Goodput, programs_compiled
from qwen2_jax.observe.lines import Line, MetricsFile
from qwen2_jax.observe.memory_use import memory
from qwen2_jax.observe.sinks import Sink, TensorBoard, WeightsAndBiases, check_installed
from qwen2_jax.parallel import chips

TRAINING = ("data", "rollout", "step", "other")  # phases that speed and utilisation are measured over
SUMMED = ("targets", "tokens")  # over the steps of a line


class Due(NamedTuple):
    """The steps of a pending line; the devices may still be computing the last of them."""

    step: int
    steps: list[dict[str, Any]]  # metrics of each


class Recorder:
    """Writes out/metrics.jsonl, the display and the outputs in `config`; docs/metrics.md describes the lines.

        with Recorder(config.log, config.out, total=steps, cost=partial(train_flops, model)) as recorder:
            recorder.start(step, state_of_the_recorder_from_the_checkpoint)
            for done in range(step + 1, steps + 1):
                with recorder.goodput("data", behind=recorder.newest): batch = next(batches)
                with recorder.goodput("step"): state, metrics = trainer.step(state, batch)
                recorder.step(done, metrics, batch)
                recorder.flush()  # before anything else uses the devices, so that this wait counts as "step"
                with recorder.goodput("save"): save(state, recorder.state())

    Values are fetched while the next step is running, and only for lines. `step` waits for the previous step, so that
    the loop is never more than one step ahead of the devices: times are accurate, and batches do not queue up in device
    memory. Every process records; process 0 writes.
    """

    def __init__(
        self,
        config: Logging,
        out: Path,
        *,
        total: int,
        cost: Callable[[np.ndarray], int] | None = None,
        about: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        """total: steps of the run. cost: FLOPs of a step from the lengths of its documents, None: no MFU.
        about: the run's configuration, for Weights & Biases."""
        self.config, self.out, self.total, self.cost, self.about = config, out, total, cost, about or {}
        self.writes = jax.process_index() == 0
        self.goodput = Goodput()
        self.newest: jax.Array | None = None  # a result of the newest step: ready when the step is done
        self.tokens = 0  # covered by the lines so far
        self.console = console or Console(stderr=True)
        self._lines = MetricsFile(out / "metrics.jsonl")
        self._display = Display(self.console, total)
        self._sinks: list[Sink] = []
        self._waiting: list[dict[str, Any]] = []  # metrics of the steps since the last line
        self._due: Due | None = None
        self._seconds = self.goodput.state()  # when the last step of the last line was done
        self._profiling = False
        peak = chips.peak_of(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak.tflops * 1e12 * jax.device_count()
        check_installed(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(failed=kind is not None)

    def start_over(self) -> None:
        """Deletes the metrics of an earlier run in the folder; call before `start` if that run is not continued."""
        if self.writes:
            for name in ("metrics.jsonl", "wandb.id"):
                (self.out / name).unlink(missing_ok=True)
            for name in ("tensorboard", "profile"):
                shutil.rmtree(self.out / name, ignore_errors=True)

    def start(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Begins after `step` with the `state` from its checkpoint; None without a checkpoint."""
        state = state or {}
        self.tokens = int(state.get("tokens", 0))
        self._waiting = [dict(metrics) for metrics in state.get("waiting", ())]
        self.goodput.load(state.get("seconds", {}))
        if self.writes:
            before = self._lines.resume(step)
            saved = sum(state.get("seconds", {}).values())
            # Time in the lines but not in the checkpoint was lost.
            self.goodput.lose(max((float(line.get("seconds") or 0) for line in before), default=0.0) - saved)
            if self.config.tensorboard:
                self._sinks.append(TensorBoard(self.out / "tensorboard", step))
            if self.config.wandb is not None:
                self._sinks.append(WeightsAndBiases(self.out, self.config.wandb, self.about))
            self._display.start(step)
            if before or step:
                self._lines.write({"step": step, "tokens": self.tokens, "seconds": self._total(), "resumed": True})
        spent = state.get("since_line", {})
        self._seconds = {phase: now - spent.get(phase, 0.0) for phase, now in self.goodput.state().items()}
        self._profile(step)

    def step(self, done: int, metrics: Mapping[str, jax.Array], batch: Batch | None = None) -> Line | None:
        """Step number `done` (from 1) was dispatched to the devices. Returns the line that was written, if any.

        metrics: docs/metrics.md lists the known names. batch: this host's rows, for FLOPs and digests.
        """
        self._wait()
        self.newest = next(x for x in jax.tree.leaves(metrics) if hasattr(x, "block_until_ready"))
        line = self._write_due()
        self._waiting.append({**metrics, **self._facts(batch)})
        if done % self.config.every == 0 or done == self.total:
            self._due, self._waiting = Due(done, self._waiting), []
        self._profile(done)
        if self.writes:
            self._display.step(done)
        return line

    def evaluation(self, step: int, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes held-out scores {name: {"loss": nats, "accuracy": share}}, numbers or jax arrays."""
        self.flush()
        held_out = {name: {key: float(value) for key, value in score.items()} for name, score in scores.items()}
        tokens = self.tokens + sum(metrics.get("tokens", 0) for metrics in self._waiting)
        self._write({"step": step, "tokens": tokens, "seconds": self._total(), "held_out": held_out})

    def flush(self) -> Line | None:
        """Waits for the newest step and writes the line that is due, if one is. Returns it."""
        self._wait()
        line = self._write_due()
        self._waiting = [_fetch(metrics) for metrics in self._waiting]
        return line

    def state(self) -> dict[str, Any]:
        """The state for the checkpoint of the newest step, JSON-serializable. Writes the pending line first."""
        self.flush()
        return {
            "tokens": self.tokens,
            "seconds": self.goodput.state(),
            "since_line": self._since_line(),
            "waiting": self._waiting,
        }

    def close(self, failed: bool = False) -> None:
        """Writes the pending line and closes everything. May be called twice."""
        try:
            if self._profiling:
                self._stop_profile()
            if not failed:
                self.flush()
        finally:
            self._display.close()
            self._lines.close()
            for sink in self._sinks:
                sink.close()
            self._sinks = []

    def _wait(self) -> None:
        """Waits for the newest step."""
        with self.goodput("step"):
            if self.newest is not None:
                self.newest.block_until_ready()

    def _facts(self, batch: Batch | None) -> dict[str, Any]:
        """FLOPs and digest of a batch. FLOPs are scaled from this host's rows to all hosts."""
        if batch is None:
            return {}
        facts: dict[str, Any] = {}
        if self.cost is not None:
            facts["flops"] = self.cost(flops.segment_lengths(batch.segments_BT)) * jax.process_count()
        if self.config.batch_digest:
            facts["digest"] = digest(batch)
        return facts

    def _write_due(self) -> Line | None:
        """Writes the line that is due, if any. Call it when its last step is done, so that the clock shows its time."""
        if self._due is None:
            return None
        due, self._due = self._due, None
        times, self._seconds = self._since_line(), self.goodput.state()
        with self.goodput("other"):
            steps = [_fetch(metrics) for metrics in due.steps]
            values = reduce(steps)
            tokens = values.pop("tokens", 0)
            self.tokens += tokens
            seconds = max(sum(times[phase] for phase in TRAINING), 1e-9)
            line = {"step": due.step, "tokens": self.tokens, "seconds": self._total()} | values
            line |= {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / len(steps)}
            if self._peak is not None and "flops" in line:
                line["mfu"] = line["flops"] / seconds / self._peak
            line |= {"data_share": times["data"] / seconds, "goodput": self.goodput.share()}
            if times["rollout"]:
                line["rollout_share"] = times["rollout"] / seconds
            line["time"] = {phase: round(spent, 4) for phase, spent in times.items() if spent}
            line |= memory() | {"programs": programs_compiled()}
            self._write(line)
        return line

    def _write(self, line: Line) -> None:
        if not self.writes:
            return
        self._lines.write(line)
        for sink in self._sinks:
            sink.write(line["step"], line)
        self._display.line(line)

    def _since_line(self) -> dict[str, float]:
        """Seconds per phase since the last step of the last line was done."""
        return {phase: now - self._seconds[phase] for phase, now in self.goodput.state().items()}

    def _total(self) -> float:
        return round(self.goodput.total(), 3)

    def _profile(self, done: int) -> None:
        """Starts and stops the profiler's window around the steps that the config names."""
        if self.config.profile is None or not self.writes:
            return
        first, last = self.config.profile
        if done == first - 1:
            self._wait()  # keeps the step before the window out of it
            jax.profiler.start_trace(self.out / "profile")
            self._profiling = True
        elif done == last and self._profiling:
            self._stop_profile()

    def _stop_profile(self) -> None:
        self._wait()
        jax.profiler.stop_trace()
        self._profiling = False
        self.console.print(f"profile written to {self.out / 'profile'}", soft_wrap=True)


def reduce(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One set of values for several steps: counts are summed; "ratios", pairs (total, count), are summed and divided;
    everything else has its last value.

    Steps whose loss is not finite are left out of the ratios; if all are, the loss is NaN.
    """
    values = dict(steps[-1])
    for name in (*SUMMED, "flops"):
        if name in values:
            values[name] = sum(step[name] for step in steps)
    finite = [step for step in steps if math.isfinite(step.get("loss", 0.0))]
    values.pop("ratios", None)
    for name in dict.fromkeys(name for step in steps for name in step.get("ratios", ())):
        pairs = [step["ratios"][name] for step in finite if name in step["ratios"]]
        count = sum(count for _, count in pairs)
        values[name] = sum(total for total, _ in pairs) / count if count else math.nan
    if "digest" in values:
        values["batches"] = [step["digest"] for step in steps]
        del values["digest"]
    return values


def digest(batch: Batch) -> str:
    """A digest of all arrays of the batch, 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for name, field in ((name, field) for name, field in batch._asdict().items() if field is not None):
        array = np.ascontiguousarray(field)
        state.update(f"{name} {array.dtype} {array.shape} ".encode())
        state.update(array.data)
    return state.hexdigest()


def _fetch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Fetches device values as Python numbers and lists; other values stay."""
    return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, jax.device_get(dict(metrics)))
