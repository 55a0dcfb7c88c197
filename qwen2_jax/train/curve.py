# SPDX-License-Identifier: Apache-2.0
"""The loss curve of a run as a PNG."""

import json
from pathlib import Path

from qwen2_jax.errors import UserError


def read(metrics: Path) -> list[dict]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]


def draw(metrics: Path, png: Path) -> None:
    """Training loss over tokens, and the accuracy on held-out targets where it was measured."""
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise UserError("the loss curve needs matplotlib: pip install matplotlib") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read(metrics)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    train = [line for line in lines if "loss" in line]
    left.plot([x["tokens"] / 1e6 for x in train], [x["loss"] for x in train], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss (nats per target)", yscale="log")
    held_out = [line for line in lines if "held_out" in line]
    for kind in held_out[0]["held_out"] if held_out else ():
        right.plot(
            [x["tokens"] / 1e6 for x in held_out], [x["held_out"][kind]["accuracy"] for x in held_out], label=kind
        )
    right.set(xlabel="million tokens", ylabel="held-out target tokens predicted right", ylim=(0, 1.02))
    if held_out:
        right.legend()
    figure.tight_layout()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=100)
    pyplot.close(figure)
