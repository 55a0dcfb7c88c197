# SPDX-License-Identifier: Apache-2.0
"""Optional outputs for metrics besides metrics.jsonl: TensorBoard and Weights & Biases."""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen2_jax.errors import UserError
from qwen2_jax.observe.config import Logging
from qwen2_jax.observe.lines import flat


class Sink(Protocol):
    def write(self, step: int, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed(config: Logging) -> None:
    """Raises UserError if a package that the config needs is missing. Cheap: imports none of them."""
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("log.tensorboard needs tensorboardX: pip install tensorboardX, or give --log.no-tensorboard")
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb needs Weights & Biases: pip install wandb")


class TensorBoard:
    """Event files in `folder`. TensorBoard hides what an earlier process wrote after `step`."""

    def __init__(self, folder: Path, step: int):
        import tensorboardX  # type: ignore[import-untyped]

        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        for name, value in flat(line).items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run per run folder: its id is kept in `folder`/wandb.id, so that the same command resumes it.

    Curves use our step as the horizontal axis, because W&B's own only increases: steps repeated after a crash are sent
    again, with the same values.
    """

    def __init__(self, folder: Path, project: str, about: Mapping[str, Any]):
        import wandb  # type: ignore[import-not-found]

        known = folder / "wandb.id"
        name = known.read_text("utf-8").strip() if known.exists() else ""
        if not name:
            name = secrets.token_hex(4)
            known.write_text(name + "\n", "utf-8")
        self._run = wandb.init(
            project=project, name=folder.name, id=name, resume="allow", dir=str(folder), config=dict(about)
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        self._run.log({**flat(line), "step": step})

    def close(self) -> None:
        self._run.finish()
