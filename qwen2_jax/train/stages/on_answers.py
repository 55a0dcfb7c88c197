# SPDX-License-Identifier: Apache-2.0
"""The common part of online DPO and GRPO: the model samples answers, they are rewarded, and it learns from them."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.train.config import Mesh
from qwen2_jax.train.job import TrainingJob
from qwen2_jax.train.online import episodes, prompt_selection, reference, scoring
from qwen2_jax.train.online.episodes import Answer, AnswerGroup
from qwen2_jax.train.online.greedy_answers import GreedyAnswers
from qwen2_jax.train.online.sampled_batches import Sampled
from qwen2_jax.train.online.sampler import Sampler
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.stage import OpenedStage, Stage
from qwen2_jax.train.step import Trainer
from qwen2_jax.weights.params import Tree


class OnlineStage(Stage):
    """A subclass gives `objective` and `groups`, and says whether a reference is needed."""

    run: Online

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference's log-probabilities."""
        return True

    def check_processes(self, processes: int) -> None:
        if processes > 1:
            raise UserError(
                f"{type(self.run).__name__} samples its answers in one process, and {processes} are here: give "
                "--processes 1 on a machine that holds the model, or train on rankings with Dpo"
            )

    @property
    def sampling_mesh(self) -> Mesh | None:
        return self.run.sampling.mesh

    def groups(self, answers_PQ: Sequence[Sequence[Answer]], rewards_PQ: np.ndarray) -> list[list[AnswerGroup]]:
        """Of each prompt, the groups of answers to train on. rewards: NaN for an answer without one."""
        raise NotImplementedError(f"{type(self).__name__} makes no groups")

    def first_batch(self, job: TrainingJob, host: tuple[int, int]) -> Batch:
        """The first prompts: their answers are not sampled yet."""
        assert isinstance(job.data, Prompts)
        zero = np.zeros(1, np.float32)  # an answer has a token at least: the prompt's last one stands for it
        asked = [
            [Answer(prompt.ids[:-1], np.array(prompt.ids[-1:]), zero, counts=False)]
            for prompt in job.data.batch(0, self.run.prompts)
        ]
        return episodes.pack(asked, rows=self.run.rows, length=self.run.length, pad=job.tokenizer.fill_id)

    @contextlib.contextmanager
    def open(
        self, job: TrainingJob, trainer: Trainer, done: int, frozen: Tree | None, kept: dict[str, Any], console: Console
    ) -> Iterator[OpenedStage]:
        run = self.run
        compared = reference.weights(job, trainer, frozen) if self.needs_reference else None
        with contextlib.ExitStack() as stack:
            sampler = Sampler(run, job, trainer, scoring.opened(run, job.mesh, stack, console))
            feed = Sampled(sampler, self.groups, console, reference=compared, kept=kept.get("episode"))
            if run.order == "variance" or run.keep is not None:
                first = reference.weights(job, trainer, frozen) if compared is None else compared
                measure = partial(sampler.measure, first)
                feed.prompts = prompt_selection.selected(run, feed.prompts, measure, run.out / "difficulty.json")
            yield OpenedStage(feed, GreedyAnswers(sampler))

    @property
    def extra_columns(self) -> tuple[str, ...]:
        made = ("old_BT", "sampled_BT", "advantages_BT")
        return ("reference_BT", *made) if self.needs_reference else made

    @property
    def holds_reference(self) -> bool:
        return self.needs_reference and self.run.lora is None

    @property
    def episodes(self) -> Online:
        return self.run
