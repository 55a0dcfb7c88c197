# SPDX-License-Identifier: Apache-2.0
"""The differences between kinds of training. A run's dataclass names its stage; other code calls `stage_of(run)`.

A new stage is one file: a dataclass derived from config.Run, and a class derived from Stage that it names
(docs/training.md has an example). The stages that come with the package are in stages/; their dataclasses, in config.py
and post_training_config.py, name them as text, so that a configuration is read before the rest is imported.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.train.batch_sources import Corpus, Feed
from qwen2_jax.train.config import Mesh, Run
from qwen2_jax.train.evaluator import Evaluator, HeldOutRows
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.objectives.batch_losses import Objective
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree


def unchanged(batch: Batch) -> Batch:
    """The batch as it is: nothing has to be added to it on the devices."""
    return batch


@dataclasses.dataclass(frozen=True)
class OpenedStage:
    """The inputs of the loop. feed: batches on the host. evaluator: scores on held-out data.

    complete: adds to a batch on the devices what only a model can compute, such as a reference's log-probabilities.
    """

    feed: Feed
    evaluator: Evaluator
    complete: Callable[[Batch], Batch] = unchanged


class Stage:
    """How one kind of run starts, gets its batches, and what it minimises and evaluates.

    A subclass gives `objective`, and overrides what else differs: the defaults are those of training on packed rows of
    a data set. run: the configuration, an instance of the dataclass that names this class.
    """

    def __init__(self, run: Any):
        self.run: Run = run

    # How the run starts.

    def check_processes(self, processes: int) -> None:
        """Raises UserError where so many processes cannot train this together."""

    @property
    def sampling_mesh(self) -> Mesh | None:
        """A second division of the devices, for sampling answers; None: there is none."""
        return None

    def architecture(self, config: ModelConfig, name: str) -> ModelConfig:
        """The architecture that is trained, from that of the checkpoint or model called `name`.

        Raises UserError where the stage cannot start from it.
        """
        if config.scores:
            raise UserError(
                f"{name} is a reward model, which writes no answers; start from the chat model that it was made from, "
                "and give the reward model as reward_model in an online stage"
            )
        return config

    def load(self, job: TrainingJob, dtype: str) -> Tree:
        """The weights that the run starts from, on the job's mesh. dtype: see checkpoint.load_params."""
        assert job.source is not None
        return checkpoint.load_params(job.source, job.config, dtype=dtype, mesh=job.mesh, only_layers=True)

    def result_config(self, job: TrainingJob) -> ModelConfig:
        """The configuration that is written beside the trained weights."""
        return job.config

    # Data and batches.

    def check_data(
        self, data: Loaded | Prompts, held_out: dict[str, Loaded | Prompts]
    ) -> tuple[Loaded | Prompts, dict[str, Loaded | Prompts]]:
        """(data, held-out data) as the stage takes them. Raises UserError for data of another kind."""
        if ranked := [name for name, one in {"data": data, **held_out}.items() if getattr(one, "ranks", 1) > 1]:
            raise UserError(
                f"{', '.join(ranked)}: rankings, of which this run would learn the rejected answers too; they are for "
                "Dpo and Reward. For fine-tuning give messages, or prompt and completion"
            )
        return data, held_out

    def first_batch(self, job: TrainingJob, host: tuple[int, int]) -> Batch:
        """The batch that a dry run shows. host: as in data.tokens.loader.Loaded.batches."""
        assert isinstance(job.data, Loaded)
        return next(job.data.batches(self.run.rows, host=host))

    @contextlib.contextmanager
    def open(
        self, job: TrainingJob, trainer: Trainer, done: int, frozen: Tree | None, kept: dict[str, Any], console: Console
    ) -> Iterator[OpenedStage]:
        """Feed and evaluator for the steps after `done`. kept: what the checkpoint of that step holds of the feed."""
        yield on_rows(job, trainer, done)

    # The objective.

    def objective(self, *, groups: int = 1, ranks: int = 1) -> Objective:
        """groups, ranks: the most groups that a row holds, and the most sequences of a group, in data with groups."""
        raise NotImplementedError(f"{type(self).__name__} gives no objective")

    def objective_of(self, job: TrainingJob) -> Objective:
        """The objective on the job's data."""
        rows = [data for data in (job.data, *job.held_out.values()) if isinstance(data, Loaded)]
        groups, ranks = (max((getattr(x, n) for x in rows), default=1) for n in ("groups_per_row", "ranks"))
        return self.objective(groups=groups, ranks=ranks)

    # For plans (plan/train.py).

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """The fields of Batch, beside the first five, that a step reads."""
        return ()

    @property
    def holds_reference(self) -> bool:
        """Whether a reference's weights, other than those below adapters, stay on the devices during training."""
        return False

    @property
    def episodes(self) -> Online | None:
        """The run, if it samples its own answers; None otherwise."""
        return None


def on_rows(
    job: TrainingJob, trainer: Trainer, done: int, complete: Callable[[Batch], Batch] = unchanged
) -> OpenedStage:
    """Training and evaluation on packed rows of data sets. complete: see OpenedStage."""
    return OpenedStage(Corpus(job, trainer, done), HeldOutRows(job, trainer, complete), complete)


def stage_of(run: Run) -> Stage:
    """The stage that the run's dataclass names. Raises UserError for a base class, which names none."""
    named = run.stage
    if named is None:
        raise UserError(f"{type(run).__name__} is no stage of training; use Pretrain, Sft, Dpo, Grpo or another one")
    if isinstance(named, str):  # "module:class", imported here because stages import more than a configuration needs
        module, name = named.split(":")
        named = getattr(importlib.import_module(module), name)
    return named(run)
