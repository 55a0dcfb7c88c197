# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization and its relatives, on pairs of answers and against a reference model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.objectives.batch_losses import Pairs
from qwen2_jax.train.online import reference
from qwen2_jax.train.post_training_config import Dpo
from qwen2_jax.train.stage import OpenedStage, Stage, on_rows
from qwen2_jax.train.stages.reward import with_equal_ranks
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree


class DpoStage(Stage):
    run: Dpo

    def check_data(
        self, data: Loaded | Prompts, held_out: dict[str, Loaded | Prompts]
    ) -> tuple[Loaded | Prompts, dict[str, Loaded | Prompts]]:
        data, held_out = with_equal_ranks(data, held_out)
        if data.ranks > 2:
            raise UserError(
                f"DPO learns from pairs, and there are prompts with {data.ranks} responses: give pairs (chosen and "
                "rejected), or train a reward model on these"
            )
        return data, held_out

    def objective(self, *, groups: int = 1, ranks: int = 1) -> Pairs:
        return Pairs(self.run.preference, groups)

    @contextlib.contextmanager
    def open(
        self, job: TrainingJob, trainer: Trainer, done: int, frozen: Tree | None, kept: dict[str, Any], console: Console
    ) -> Iterator[OpenedStage]:
        if self.run.reference == "cached":
            yield on_rows(reference.cached(job, trainer, done, frozen, console), trainer, done)
            return
        weights = reference.weights(job, trainer, frozen)

        def with_reference(batch: Batch) -> Batch:
            return batch._replace(reference_BT=trainer.logprobs(weights, batch))

        yield on_rows(job, trainer, done, with_reference)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        return ("reference_BT",)

    @property
    def holds_reference(self) -> bool:
        return self.run.reference == "live" and self.run.lora is None
