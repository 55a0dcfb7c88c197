# SPDX-License-Identifier: Apache-2.0
"""Plots of runs from their metrics.jsonl: the curves of one run, or a comparison of several.

python -m qwen2_jax.observe.plots runs/sft                    # runs/sft/curves.png, also during the run
python -m qwen2_jax.observe.plots runs/a runs/b --out ab.png  # compared, over tokens
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from qwen2_jax.errors import UserError, run_and_exit
from qwen2_jax.observe.lines import Line, read

__all__ = ["draw", "overlay", "read"]

# Okabe and Ito's palette for colour-blind readers; markers and dashes carry the same information.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens"))
SCORES = (  # metrics of which larger is better: name, title, unit
    ("accuracy", "Accuracy", "targets predicted right"),
    ("rewards/accuracies", "Preferences", "pairs in the right order"),
    ("reward", "Reward", "mean over answers"),
)
MISSING = "curves need matplotlib: pip install matplotlib, or the extra 'logging'"
SMOOTH_FROM = 40  # from this many lines on, a running mean is drawn over the curve


class History:
    """Columns of a metrics.jsonl. Numbers that were not finite are NaN, which leaves a gap in a curve."""

    def __init__(self, path: Path):
        lines = read(path) if path.is_file() else []
        self.steps = [line for line in lines if "loss" in line]
        self.scored = [line for line in lines if "held_out" in line]
        self.resumed = [line["tokens"] for line in lines if line.get("resumed") and line["step"]]
        if not self.steps:
            raise UserError(f"{path} has no line with a loss, so there is nothing to plot")

    def __contains__(self, name: str) -> bool:
        return any(line.get(name) is not None for line in self.steps)

    @property
    def tokens(self) -> np.ndarray:
        return numbers(self.steps, "tokens")

    def column(self, name: str) -> np.ndarray:
        return numbers(self.steps, name)

    def held_out(self, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{source: (tokens, values)} of "loss" or "accuracy"."""
        curves = {}
        for name in dict.fromkeys(name for line in self.scored for name in line["held_out"]):
            values = np.array([_number(line["held_out"].get(name, {}).get(key)) for line in self.scored])
            if not np.isnan(values).all():
                curves[name] = (numbers(self.scored, "tokens"), values)
        return curves


def available() -> bool:
    """Whether matplotlib, which draws the pictures, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(metrics: Path, png: Path) -> None:
    """One run: training and held-out loss, learning rate, gradient norm, speed; accuracies and expert load if logged.

    Raises UserError if there is nothing to draw, or if matplotlib is missing.
    """
    run = History(metrics)
    panels = [partial(_losses, run=run)]
    for name, title, unit in SCORES:
        if run.held_out(name) or (name in run and name != "accuracy"):
            panels.append(partial(_scores, run=run, name=name, title=title, unit=unit))
    for name, title, unit, scale in (
        ("learning_rate", "Learning rate", "learning rate", "linear"),
        ("gradient_norm", "Gradient norm", "norm before clipping", "log"),
        ("tokens_per_second", "Speed", "tokens per second", "linear"),
    ):
        if name in run:
            panels.append(partial(_one, run=run, name=name, title=title, unit=unit, scale=scale))
    if "moe/load" in run:
        panels.append(partial(_load, run=run))
    _figure(panels, png, metrics.parent.name, float(run.tokens[-1]))


def overlay(runs: Sequence[tuple[str, Path]], png: Path, *, title: str = "") -> None:
    """Several runs over tokens: training loss, and the loss of each held-out source.

    runs: (label, metrics.jsonl) of each.
    """
    read_runs = [(label, History(path)) for label, path in runs]
    sources = dict.fromkeys(name for _, run in read_runs for name in run.held_out("loss"))

    def training(axes):
        for i, (label, run) in enumerate(read_runs):
            _noisy(axes, run.tokens, run.column("loss"), COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], label)
        axes.set(title="Training loss", ylabel="nats per target")
        _enlarge(axes)

    def held_out(axes, source):
        for i, (label, run) in enumerate(read_runs):
            if source in (curves := run.held_out("loss")):
                _points(axes, *curves[source], i, label)
        axes.set(title=f"Held-out loss: {source}", ylabel="nats per target")
        _enlarge(axes)

    panels: list[Callable[[Any], None]] = [training, *(partial(held_out, source=source) for source in sources)]
    _figure(panels, png, title, max(float(run.tokens[-1]) for _, run in read_runs))


def numbers(lines: Iterable[Line], name: str) -> np.ndarray:
    """One value of each line, NaN where there is none."""
    return np.array([_number(line.get(name)) for line in lines])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _figure(panels: Sequence[Callable[[Any], None]], png: Path, title: str, tokens: float) -> None:
    """Draws each panel into a grid and writes the file; `tokens`: the end of the horizontal axes."""
    if not available():
        raise UserError(MISSING)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    unit, name = next(((unit, name) for unit, name in UNITS if tokens >= 2 * unit), UNITS[-1])
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
        )
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel(axes)
            axes.set_xlabel(name)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / unit:g}"))
            axes.set_xlim(left=0)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=120)
        pyplot.close(figure)


def _losses(axes, run: History) -> None:
    _noisy(axes, run.tokens, run.column("loss"), COLOURS[0], "-", "training")
    for i, (name, (tokens, values)) in enumerate(run.held_out("loss").items(), 1):
        _points(axes, tokens, values, i, f"held out: {name}")
    for i, tokens in enumerate(run.resumed):
        axes.axvline(tokens, color="#888888", linewidth=0.8, linestyle=":", label=None if i else "resumed")
    axes.set(title="Loss", ylabel="nats per target" if "accuracy" in run else "loss of the stage")
    _legend(axes)


def _scores(axes, run: History, name: str, title: str, unit: str) -> None:
    if name in run:
        _noisy(axes, run.tokens, run.column(name), COLOURS[0], "-", "training")
    for i, (source, (tokens, values)) in enumerate(run.held_out(name).items(), 1):
        _points(axes, tokens, values, i, f"held out: {source}")
    axes.set(title=title, ylabel=unit)
    if name != "reward":  # a share
        axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    _legend(axes)


def _one(axes, run: History, name: str, title: str, unit: str, scale: str) -> None:
    axes.plot(run.tokens, run.column(name), color=COLOURS[0], linewidth=1)
    if not (run.column(name) > 0).any():
        scale = "linear"
    axes.set(title=title, ylabel=unit, yscale=scale)
    if scale == "linear":
        axes.set_ylim(bottom=0)
        if name == "learning_rate":
            axes.ticklabel_format(axis="y", scilimits=(0, 0))
        else:
            axes.yaxis.set_major_formatter("{x:,g}")


def _load(axes, run: History) -> None:
    """The busiest and the idlest expert, as multiples of an even share."""
    lines = [line for line in run.steps if line.get("moe/load")]
    load = np.array([line["moe/load"] for line in lines], float)
    load *= load.shape[1] / load.sum(axis=1, keepdims=True)
    tokens = numbers(lines, "tokens")
    axes.fill_between(tokens, load.min(axis=1), load.max(axis=1), color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(tokens, load.max(axis=1), color=COLOURS[1], linewidth=1, label="busiest expert")
    axes.plot(tokens, load.min(axis=1), color=COLOURS[0], linewidth=1, linestyle="--", label="idlest expert")
    axes.axhline(1, color="#000000", linewidth=0.8)
    axes.set(title=f"Load of {load.shape[1]} experts", ylabel="tokens, 1 = an even share")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _noisy(axes, x: np.ndarray, y: np.ndarray, colour: str, dash: str, label: str) -> None:
    """A curve; where it has many points, its running mean with the noise in the background."""
    window = len(y) // 20
    if len(y) < SMOOTH_FROM:
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.2, marker=".", label=label)
        return
    axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(x, running_mean(y, window), color=colour, linestyle=dash, linewidth=1.6, label=label)


def _enlarge(axes) -> None:
    """Scales the vertical axis to the values after the first tenth of the run, where runs differ little."""
    curves = [line.get_xydata() for line in axes.lines]
    end = max(xy[:, 0].max() for xy in curves)
    shown = np.concatenate([xy[xy[:, 0] >= 0.1 * end, 1] for xy in curves])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        margin = 0.05 * (shown.max() - shown.min()) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    _legend(axes)


def _legend(axes) -> None:
    axes.legend(ncols=1 if len(axes.get_legend_handles_labels()[1]) < 6 else 2)


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the points within window / 2 of each, fewer at the ends; NaNs are left out."""
    half = max(1, window // 2)
    near = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    return np.array([values[~np.isnan(values)].mean() if not np.isnan(values).all() else np.nan for values in near])


def _points(axes, x: np.ndarray, y: np.ndarray, number: int, label: str) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=0.8, linestyle=":", label=label)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path | None = None) -> int:
    """Plots one run folder, or compares several.

    Args:
        runs: folders with a metrics.jsonl.
        out: the .png file; default for a single run: curves.png in its folder.
    """
    if not runs or (len(runs) > 1 and out is None):
        raise UserError("give one run folder, or several and --out FILE.png")
    png = out or runs[0] / "curves.png"
    if len(runs) == 1:
        draw(runs[0] / "metrics.jsonl", png)
    else:
        overlay([(str(run), run / "metrics.jsonl") for run in runs], png)
    print(f"wrote {png}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
