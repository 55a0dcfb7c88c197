# SPDX-License-Identifier: Apache-2.0
"""Runs a configuration: trains, or makes a mixture of experts out of a dense checkpoint."""

from pathlib import Path

from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.errors import UserError
from qwen2_jax.parallel.hosts import Group
from qwen2_jax.train import loop
from qwen2_jax.train.config import Upcycle
from qwen2_jax.train.config_file import Recipe
from qwen2_jax.train.result_folders import check_stays
from qwen2_jax.train.state.lock import alone
from qwen2_jax.train.upcycle import upcycle


def run(config: Recipe, console: Console | None = None, *, group: Group | None = None) -> Path | None:
    """Runs a configuration; returns the folder with the result, None if there is none (yet).

    group: the processes that run it together, default this one only. All of them call this; process 0 logs and writes.
    """
    group = group or Group()
    console = console or Console(stderr=True, quiet=not group.first)
    if not isinstance(config, Upcycle):
        return loop.run(config, console, group=group)
    if group.processes > 1:
        raise UserError(f"upcycling runs in one process, and there are {group.processes}: give --processes 1")
    return _upcycle(config, console)


def _upcycle(config: Upcycle, console: Console) -> Path | None:
    """Writes the mixture of experts unless it exists, and reports how close its outputs are to the dense model's."""
    folder = config.out / "hf"
    check_stays("checkpoint", checkpoint.locate(config.checkpoint).path, [folder])
    if config.dry_run:
        console.print(upcycle.sizes(config.checkpoint, config.experts))
        return None
    with alone(config.out):
        if folder.exists() and config.resume:
            console.print(f"{folder} exists already; --no-resume makes it again", soft_wrap=True)
            return folder
        report = str(upcycle.write(config.checkpoint, folder, config.experts, console, replace=not config.resume))
        (config.out / "report.txt").write_text(report + "\n", "utf-8")
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {folder}", soft_wrap=True)
    return folder
