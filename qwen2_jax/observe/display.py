# SPDX-License-Identifier: Apache-2.0
"""Console output of a run: a progress bar on a terminal, one plain line per metrics line elsewhere."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

# Metric name and its format, in display order.
SHOWN: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda x: f"loss {x:.4f}"),
    ("reward", lambda x: f"reward {x:.3f}"),
    ("rewards/accuracies", lambda x: f"pairs right {x:.1%}"),
    ("kl", lambda x: f"kl {x:.4f}"),
    ("completions/mean_length", lambda x: f"length {x:.0f}"),
    ("learning_rate", lambda x: f"lr {x:.2e}"),
    ("gradient_norm", lambda x: f"grad {x:.2f}"),
    ("tokens_per_second", lambda x: f"{x:,.0f} tokens/s"),
    ("mfu", lambda x: f"MFU {x:.1%}"),
    ("data_share", lambda x: f"data wait {x:.1%}"),
    ("rollout_share", lambda x: f"sampling {x:.0%} of the time"),
    ("moe/load_max", lambda x: f"load max {x:.2f}"),
    ("skipped", lambda x: f"skipped {x}" if x else ""),
)
HELD_OUT: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda x: f"loss {x:.4f}"),
    ("accuracy", lambda x: f"accuracy {x:.1%}"),
    ("rewards/accuracies", lambda x: f"pairs right {x:.1%}"),
    ("reward", lambda x: f"reward {x:.3f}"),
)


class Display:
    """Shows steps, lines and held-out scores on a console."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self._bar = _Bar(console) if console.is_terminal else None
        self._now, self._first, self._began = 0, 0, 0.0

    def start(self, step: int) -> None:
        self._now, self._first = step, step + 1
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("step", total=self.total, completed=step, left="")

    def step(self, done: int) -> None:
        """A step was dispatched to the devices."""
        self._now = done
        if done == self._first:  # it included compilation, so the rate is measured from here
            self._began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, left=self._left())

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics has been written."""
        if "held_out" in line:
            self.console.print(_held_out(line), soft_wrap=True, highlight=False)
        elif self._bar is not None:
            self._bar.below = summary(line)
            self._bar.refresh()
        else:
            start = f"step {line['step']}/{self.total}"
            parts = (start, summary(line), self._left())
            self.console.print("  ".join(filter(None, parts)), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Stops the progress bar. May be called twice."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self) -> str:
        """Time left at the rate of this process so far, including saves and evaluations."""
        if self._now <= self._first:
            return ""
        seconds = (time.monotonic() - self._began) / (self._now - self._first) * (self.total - self._now)
        return f"{duration(seconds)} left"


class _Bar(Progress):
    """The progress bar, with the latest metrics below it."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(None), TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self.below = ""
        super().__init__(*columns, console=console, expand=True, refresh_per_second=2)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim")


def summary(line: Mapping[str, Any]) -> str:
    """The main metrics of a line, as text."""
    parts = [show(line[name]) for name, show in SHOWN if line.get(name) is not None]
    if "loss" in line and line["loss"] is None:
        parts.insert(0, "loss not finite")
    return "  ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """3700 -> '1 h 01 min', 130 -> '2 min', 9 -> '9 s'."""
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes / 60 / 24:.1f} days"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


def _held_out(line: Mapping[str, Any]) -> str:
    scores = []
    for name, score in line["held_out"].items():
        numbers = [show(score[key]) for key, show in HELD_OUT if score.get(key) is not None]
        scores.append(f"{name}: {', '.join(numbers)}")
    return f"step {line['step']} held out  " + "  ".join(scores)
