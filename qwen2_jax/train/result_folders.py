# SPDX-License-Identifier: Apache-2.0
"""The folders that a run writes its result to, and the check that the run reads none of them."""

import os
from pathlib import Path
from typing import Any

from qwen2_jax.errors import UserError
from qwen2_jax.train.config import Run

SMALL_FILES = "tokenizer"  # folder in the run's, with the files that are copied beside the weights


def results(run: Run, folder: Path) -> list[Path]:
    """The folders that an export to `folder` makes: adapters as PEFT's files, and last the whole weights if it can."""
    if run.lora is None:
        return [folder]
    adapters = folder.with_name(folder.name.replace("hf", "adapter"))
    rounded = run.lora_base in ("int8", "int4")  # merging would round the adapters away
    return [adapters] if rounded else [adapters, folder]


def check_inputs_stay(run: Run, start: Any = None, tokenizer: Any = None) -> None:
    """Raises UserError where a folder that the run reads is one that its result replaces, however its path is written.

    start, tokenizer: where the checkpoint that the run starts from and its tokenizer were found.
    """
    given = {"start.checkpoint": start, "tokenizer": tokenizer}
    if run.start is not None:
        given["start.adapter"] = run.start.adapter
    if run.optim.merging is not None:
        given |= {"optim.merging.base": run.optim.merging.base, "optim.merging.sft": run.optim.merging.sft}
    if (judge := getattr(run, "reward_model", None)) is not None:
        given["reward_model.checkpoint"] = judge.checkpoint
    for name, path in given.items():
        if isinstance(path, str | Path):
            check_stays(name, path, _written(run))


def check_stays(name: str, path: str | Path, written: list[Path]) -> None:
    """Raises UserError if the folder at `path` is one of `written` or lies in one. name: of the field that gives it."""
    read = Path(path).expanduser()
    if not read.exists():  # the name of a checkpoint elsewhere
        return
    place = read.resolve()
    for folder in written:
        if folder.exists() and any(os.path.samefile(folder, part) for part in (place, *place.parents)):
            raise UserError(
                f"{name} is {path}, and the result would be written to {folder}, which is the same folder: give "
                "another --out, and the model that the run reads stays as it is"
            )


def _written(run: Run) -> list[Path]:
    """Folders of `run.out` that exist and that this run, or a longer one, replaces."""
    every = run.checkpoints.export_every
    steps = [path.name.rpartition("-")[2] for path in run.out.glob("*-*")] if every else []
    exports = [f"hf-{step}" for step in steps if step.isdecimal() and int(step) % (every or 1) == 0]
    return [run.out / SMALL_FILES, *(path for name in ("hf", *exports) for path in results(run, run.out / name))]
