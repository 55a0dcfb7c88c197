# SPDX-License-Identifier: Apache-2.0
"""The sources of a loop's batches: packed rows of a data set, or the model's own answers (sampled_batches.py)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree


class Next(NamedTuple):
    """The input of the next step. batch: this process's rows, numpy arrays on the host; the loop puts them on devices.
    metrics: finite values that are logged with the step's own."""

    batch: Batch
    metrics: Mapping[str, float] = MappingProxyType({})


class Feed(Protocol):
    """Batches for the steps after `done`, one after the other; state and frozen are the run's at that step.

    phase: what the time that `next` takes counts as (observe/goodput.py).
    """

    phase: str

    def next(self, done: int, state: State, frozen: Tree | None) -> Next: ...

    def kept(self, done: int) -> dict[str, Any]:
        """JSON for the checkpoint of step `done`, besides the state."""
        ...


class Corpus:
    """Rows of a data set: batch s is a function of (data, seed, s)."""

    phase = "data"

    def __init__(self, job: TrainingJob, trainer: Trainer, done: int):
        assert isinstance(job.data, Loaded)
        self._batches = job.data.batches(job.run.rows, start=done, host=trainer.place.host)

    def next(self, done: int, state: State, frozen: Tree | None) -> Next:
        return Next(next(self._batches))

    def kept(self, done: int) -> dict[str, Any]:
        return {}
