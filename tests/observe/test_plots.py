# SPDX-License-Identifier: Apache-2.0
"""Pictures: what is in them, from whole and from torn metrics."""

import json
import math

import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.observe import plots

pyplot = pytest.importorskip("matplotlib.pyplot")


def write(folder, lines=60, **more):
    """A metrics.jsonl with a loss that is not finite, a resume, held-out scores and a torn last line."""
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    with path.open("w") as file:
        for i in range(1, lines + 1):
            line = {"step": i, "tokens": 1000 * i, "loss": None if i == 5 else 1 + 1 / i, "gradient_norm": 1.0} | more
            file.write(json.dumps(line) + "\n")
            if i % 20 == 0:
                scores = {"prose": {"loss": 2.0, "accuracy": 0.5}, "code": {"loss": None}}
                file.write(json.dumps({"step": i, "tokens": 1000 * i, "held_out": scores}) + "\n")
        file.write(json.dumps({"step": 30, "tokens": 30_000, "resumed": True}) + "\n" + '{"step": 61, "to')
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, kept for looking into."""
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    monkeypatch.undo()
    pyplot.close("all")


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_run_has_a_panel_for_what_it_has(tmp_path, figures):
    metrics = write(tmp_path / "run", learning_rate=1e-3, tokens_per_second=500.0, **{"moe/load": [0.5, 0.25, 0.25]})
    plots.draw(metrics, tmp_path / "docs" / "run.png")
    assert (tmp_path / "docs" / "run.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["Loss", "Accuracy", "Learning rate", "Gradient norm", "Speed", "Load of 3 experts"]
    assert all(axes.get_xlabel() == "thousand tokens" and axes.get_ylabel() for axes in figure.axes)
    loss, _, _, norm, _, load = figure.axes
    assert labels(loss) == ["training", "held out: prose", "resumed"]
    assert math.isnan(loss.lines[0].get_ydata()[4]) and loss.lines[0].get_ydata()[5] == 1 + 1 / 6
    assert norm.get_yscale() == "log"
    busiest = load.lines[labels(load).index("busiest expert")]
    np.testing.assert_allclose(busiest.get_ydata(), 1.5)


def test_a_short_run_without_extras(tmp_path, figures):
    plots.draw(write(tmp_path / "run", lines=1), tmp_path / "run.png")
    assert [axes.get_title("left") for axes in figures[0].axes] == ["Loss", "Gradient norm"]


def test_runs_side_by_side(tmp_path, figures):
    runs = [(name, write(tmp_path / name)) for name in ("dense", "upcycled")]
    plots.overlay(runs, tmp_path / "both.png", title="Two")
    training, held_out = figures[0].axes
    assert labels(training) == labels(held_out) == ["dense", "upcycled"]
    assert training.get_ylim()[1] < 1.2  # the fall at the beginning does not flatten what follows
    assert len({line.get_color() for line in held_out.lines}) == 2


def test_running_mean_leaves_gaps_out():
    y = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(plots.running_mean(y, 2), [2, 2, 4, 5, 5, np.nan, np.nan])


def test_pictures_on_request(tmp_path, figures):
    runs = [write(tmp_path / name).parent for name in ("one", "other")]
    plots.main((runs[0],))
    assert (runs[0] / "curves.png").exists()
    plots.main(tuple(runs), out=tmp_path / "both.png")
    assert labels(figures[1].axes[0]) == [str(run) for run in runs]
    with pytest.raises(UserError, match="several and --out"):
        plots.main(tuple(runs))


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(UserError, match="has no line with a loss"):
        plots.draw(tmp_path / "metrics.jsonl", tmp_path / "run.png")
