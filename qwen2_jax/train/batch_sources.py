# SPDX-License-Identifier: Apache-2.0
"""Where a loop's batches come from: packed rows of a data set, or answers of the model itself (sampled_batches.py)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.job import Job
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree

Scores = dict[str, dict[str, float]]  # of each held-out source


class Next(NamedTuple):
    """What the next step takes. batch: this process's rows, on the host; placed: the whole batch on the devices.
    told: metrics that the step itself does not know; finite."""

    batch: Batch
    placed: Batch
    told: Mapping[str, float] = MappingProxyType({})


class Feed(Protocol):
    """Batches for the steps after `done`, one after the other; state and frozen are the run's at that step.

    phase: what the time that `next` takes counts as (observe/goodput.py).
    """

    phase: str

    def next(self, done: int, state: State, frozen: Tree | None) -> Next: ...

    def evaluate(self, state: State, frozen: Tree | None) -> Scores:
        """Scores on held-out data; {} where there is none."""
        ...

    def kept(self, done: int) -> dict[str, Any]:
        """What the checkpoint of step `done` must hold besides the state, as JSON."""
        ...


class Corpus:
    """Rows of data that is there before the run: batch s is a function of (data, seed, s)."""

    phase = "data"

    def __init__(self, job: Job, trainer: Trainer, done: int, reference: Callable[[Batch], Batch] | None = None):
        """reference: fills in reference_BT of a batch on the devices, where the objective needs it."""
        assert isinstance(job.data, Loaded)
        self.job, self.trainer, self.reference = job, trainer, reference or (lambda batch: batch)
        self._batches = job.data.batches(job.run.rows, start=done, host=trainer.place.host)

    def next(self, done: int, state: State, frozen: Tree | None) -> Next:
        batch = next(self._batches)
        return Next(batch, self.reference(self.trainer.place(batch)))

    def evaluate(self, state: State, frozen: Tree | None) -> Scores:
        """Means of each held-out source: "loss", and the other ratios that the objective gives.

        A micro-batch at a time: what training has memory for.
        """
        scores, run, trainer = {}, self.job.run, self.trainer
        rows, most = run.rows // run.accumulate, run.evaluation.batches * run.accumulate
        for name, data in self.job.held_out.items():
            assert isinstance(data, Loaded)
            sums = None
            for i, batch in enumerate(data.once(rows, host=trainer.place.host)):
                if i == most:
                    break
                more = trainer.score(state, self.reference(trainer.place(batch)), frozen)
                sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
            if sums is not None:
                ratios = {"loss": sums.loss, **sums.metrics}
                scores[name] = {key: float(ratio.mean()) for key, ratio in ratios.items()}
        return scores

    def kept(self, done: int) -> dict[str, Any]:
        return {}
