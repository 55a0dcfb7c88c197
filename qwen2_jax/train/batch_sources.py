# SPDX-License-Identifier: Apache-2.0
"""Where a loop's batches come from: packed rows of a data set, or answers of the model itself (sampled_batches.py)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.job import Job
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree


class Next(NamedTuple):
    """What the next step takes. batch: this process's rows, numpy arrays on the host; the loop puts them on devices.
    metrics: finite values that the step itself does not know."""

    batch: Batch
    metrics: Mapping[str, float] = MappingProxyType({})


class Feed(Protocol):
    """Batches for the steps after `done`, one after the other; state and frozen are the run's at that step.

    phase: what the time that `next` takes counts as (observe/goodput.py).
    """

    phase: str

    def next(self, done: int, state: State, frozen: Tree | None) -> Next: ...

    def kept(self, done: int) -> dict[str, Any]:
        """What the checkpoint of step `done` must hold besides the state, as JSON."""
        ...


class Corpus:
    """Rows of a data set: batch s is a function of (data, seed, s)."""

    phase = "data"

    def __init__(self, job: Job, trainer: Trainer, done: int):
        assert isinstance(job.data, Loaded)
        self._batches = job.data.batches(job.run.rows, start=done, host=trainer.place.host)

    def next(self, done: int, state: State, frozen: Tree | None) -> Next:
        return Next(next(self._batches))

    def kept(self, done: int) -> dict[str, Any]:
        return {}
