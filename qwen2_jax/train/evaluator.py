# SPDX-License-Identifier: Apache-2.0
"""Loss and metrics on held-out data, every `evaluation.every` steps."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.step import State, Trainer
from qwen2_jax.weights.params import Tree

HeldOutScores = dict[str, dict[str, float]]  # held-out source -> metric -> value


class Evaluator(Protocol):
    """Called with the run's state and frozen weights; returns {} where there is no held-out data."""

    def __call__(self, state: State, frozen: Tree | None) -> HeldOutScores: ...


class HeldOutRows:
    """Means of each held-out source: "loss", and the other ratios that the objective gives.

    complete: adds to a batch on the devices what the objective needs besides (stage.OpenedStage).
    """

    def __init__(self, job: TrainingJob, trainer: Trainer, complete: Callable[[Batch], Batch]):
        self.job, self.trainer, self.complete = job, trainer, complete

    def __call__(self, state: State, frozen: Tree | None) -> HeldOutScores:
        """A micro-batch at a time, which is what training has memory for."""
        scores, run, trainer = {}, self.job.run, self.trainer
        rows, most = run.rows // run.accumulate, run.evaluation.batches * run.accumulate
        for name, data in self.job.held_out.items():
            assert isinstance(data, Loaded)
            sums = None
            for i, batch in enumerate(data.once(rows, host=trainer.place.host)):
                if i == most:
                    break
                more = trainer.score(state, self.complete(trainer.place(batch)), frozen)
                sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
            if sums is not None:
                ratios = {"loss": sums.loss, **sums.metrics}
                scores[name] = {key: float(ratio.mean()) for key, ratio in ratios.items()}
        return scores
