# SPDX-License-Identifier: Apache-2.0
"""Scores completions with several reward functions in worker processes, robust to functions that hang or crash."""

import dataclasses
import queue
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.rewards.call import Failed, call
from qwen2_jax.rewards.reward_config import RewardFunction
from qwen2_jax.rewards.shaping import weighted
from qwen2_jax.rewards.worker import Lost, Slow, Worker

HANGS = 3  # consecutive timeouts after which the rest of the batch is skipped


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a batch of completions. None: no score."""

    totals: list[float | None]  # weighted sums
    by_name: dict[str, list[float | None]]  # each reward's scores, without its weight
    failures: list[str]  # skipped errors, one line each
    metrics: dict[str, float]  # rewards/NAME/mean, std (of those with a score) and failed (a number of completions)


class Problem(NamedTuple):
    """Why a completion has no score."""

    row: int
    reason: str


class Scorer:
    """Calls reward functions on completions and adds up their scores.

    workers: processes for the importable functions (RewardFunction.reference). The others run in this process without
    a time limit; `notes` names them. Raises UserError if a function cannot be loaded.
    """

    def __init__(self, rewards: Sequence[RewardFunction], workers: int = 2):
        self.rewards = tuple(rewards)
        titles = [reward.title for reward in self.rewards]
        if not titles or len({*titles}) < len(titles):
            raise UserError(f"rewards are {titles}: give at least one, each with its own name=...")
        if workers < 1:
            raise UserError(f"rewards need 1 worker or more, not {workers}")
        self.notes = [
            f"reward {r.title} runs in this process, without a time limit: no other process can import it; "
            'give it as "file.py:name"'
            for r in self.rewards
            if r.reference is None
        ]
        self._references = list(dict.fromkeys(r.reference for r in self.rewards if r.reference is not None))
        self._closed = False
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker(self._references) for _ in range(workers if self._references else 0)]
        self._threads = ThreadPoolExecutor(workers, "rewards")
        try:
            for worker in self._workers:
                worker.wait()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Scores completions. prompts: message lists or texts; columns: further fields; all with one value each.

        Raises UserError for a failed call with on_error="stop", and always for a configuration error.
        """
        columns = {"prompts": prompts, "completions": completions, **columns}
        count = len(completions)
        if wrong := [name for name, values in columns.items() if len(values) != count]:
            raise UserError(f"reward functions get {count} completions; of other length: {', '.join(wrong)}")
        parts = [
            (reward, range(first, min(first + size, count)))
            for reward in self.rewards
            for size in [reward.batch or max(count, 1)]
            for first in range(0, count, size)
        ]
        hangs: Counter[str] = Counter()
        away = [
            self._threads.submit(self._score, reward, columns, part, hangs)
            for reward, part in parts
            if reward.reference is not None
        ]
        try:
            waiting = iter(away)
            done = [
                self._score(reward, columns, part, hangs) if reward.reference is None else next(waiting).result()
                for reward, part in parts
            ]
        finally:
            for future in away:
                future.cancel()
        by_name: dict[str, list[float | None]] = {reward.title: [] for reward in self.rewards}
        failed = dict.fromkeys(by_name, 0)
        failures = []
        for (reward, _), (scores, problems) in zip(parts, done, strict=True):
            by_name[reward.title] += scores
            failed[reward.title] += len(problems)
            failures += [_message(reward, columns, problem) for problem in problems]
        totals = weighted([*by_name.values()], [reward.weight for reward in self.rewards])
        return Scores(totals, by_name, failures, _metrics(by_name, failed))

    def close(self) -> None:
        """Stops all workers, also during a call."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _score(
        self, reward: RewardFunction, columns: dict[str, Sequence[Any]], rows: range, hangs: Counter[str]
    ) -> tuple[list[float | None], list[Problem]]:
        """Scores a part of a batch; if the call fails, one completion at a time, to find the one that fails.

        hangs: consecutive timeouts in this batch, by reward.
        """
        try:
            if hangs[reward.title] >= HANGS:
                raise Failed(f"it is no longer called after {HANGS} consecutive timeouts")
            scores, wrong = self._call(reward, {name: [values[i] for i in rows] for name, values in columns.items()})
            hangs[reward.title] = 0
            problems = [Problem(row, reason) for row, reason in zip(rows, wrong, strict=True) if reason]
        except (Failed, Lost) as why:
            if len(rows) > 1:
                return self._one_by_one(reward, columns, rows, hangs, why)
            hangs[reward.title] += isinstance(why, Slow)
            scores, problems = [None], [Problem(rows[0], str(why))]
        if problems and reward.on_error == "stop":
            raise UserError(_message(reward, columns, problems[0]))
        return scores, problems

    def _one_by_one(
        self,
        reward: RewardFunction,
        columns: dict[str, Sequence[Any]],
        rows: range,
        hangs: Counter[str],
        why: Exception,
    ) -> tuple[list[float | None], list[Problem]]:
        done = [self._score(reward, columns, range(row, row + 1), hangs) for row in rows]
        problems = [problem for _, found in done for problem in found]
        if not problems and reward.on_error == "stop" and not isinstance(why, Slow):  # too slow only as one call
            alone = f"{why} (in a call with {len(rows)} completions; it does not fail on each of them alone)"
            raise UserError(_message(reward, columns, Problem(rows[0], alone)))
        return [score for scores, _ in done for score in scores], problems

    def _call(self, reward: RewardFunction, columns: dict[str, list[Any]]) -> tuple[list[float | None], list[str]]:
        """One call in a free worker, which is replaced if it has exited. Raises Failed and Lost."""
        if reward.reference is None:
            return call(reward.function, columns, reward.options)
        worker = self._idle.get()
        try:
            if self._closed:
                raise UserError("the Scorer was closed during a call")
            if worker.ended:  # in its last call, or killed since, for example by the OOM killer
                worker.end()
                fresh = Worker(self._references)
                self._workers[self._workers.index(worker)] = fresh
                worker = fresh
            return worker.call(reward.reference, columns, reward.options, reward.timeout)
        finally:
            self._idle.put(worker)


def _message(reward: RewardFunction, columns: dict[str, Sequence[Any]], problem: Problem) -> str:
    """Reward, prompt, completion and reason in one line."""
    prompt, answer = columns["prompts"][problem.row], columns["completions"][problem.row]
    asked = prompt if isinstance(prompt, str) or not prompt else prompt[-1].get("content")
    advice = "" if reward.on_error == "skip" else '; on_error="skip" would leave such answers without a score'
    return (
        f"reward {reward.title} on the prompt {validate.short(asked)} and the answer {validate.short(answer)}: "
        f"{problem.reason}{advice}"
    )


def _metrics(by_name: dict[str, list[float | None]], failed: dict[str, int]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, scores in by_name.items():
        known = [score for score in scores if score is not None]
        if known:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(known)
            metrics[f"rewards/{name}/std"] = statistics.stdev(known) if len(known) > 1 else 0.0
        metrics[f"rewards/{name}/failed"] = failed[name]
    return metrics
