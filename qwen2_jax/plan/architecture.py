# SPDX-License-Identifier: Apache-2.0
"""The architecture that a plan is for, from a name, a folder or a run's configuration. No weights need to exist."""

import dataclasses
import difflib
import runpy
from pathlib import Path

from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats import quantised_folder
from qwen2_jax.config.model_config import HUB_IDS, PRESETS, ModelConfig
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.train.config import Run, Upcycle
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.upcycle.upcycle import sparse_config

DEMO = "demo"


def named(name: str) -> ModelConfig:
    """Of a preset, its Hub id, "demo", a checkpoint of any format, or a folder with a config.json alone. Downloads
    nothing."""
    text = name.strip()
    ids = {hub_id.lower(): preset for preset, hub_id in HUB_IDS.items()}
    preset = ids.get(text.lower(), text.lower())
    if preset in PRESETS:
        return PRESETS[preset]
    path = Path(text).expanduser()
    if text == DEMO or path.exists():
        return checkpoint.read_config(_source(text, path))
    near = difflib.get_close_matches(text.lower(), PRESETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"a plan needs the architecture of {text!r}, which is no preset, no .gguf file and no folder with a "
        f"config.json{hint}; presets are {', '.join(PRESETS)}"
    )


def _source(text: str, path: Path) -> checkpoint.Source:
    try:
        return checkpoint.locate(text)
    except CheckpointError:  # without weights that can be read, a config.json is enough
        if not (path / "config.json").is_file():
            raise
        return checkpoint.Source("quantised" if quantised_folder.has_settings(path) else "hf", path)


def of_run(run: Run, path: Path | None) -> ModelConfig:
    """Of a training run. A checkpoint that another configuration beside `path` will write counts as there."""
    if run.start is None:
        assert run.model is not None
        return run.model
    config = _promised(run.start.checkpoint, path) or named(run.start.checkpoint)
    config = stage_of(run).architecture(config, run.start.checkpoint)
    changes = {name: getattr(run.start, name) for name in ("rope_theta", "max_position_embeddings")}
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    if run.length > config.max_position_embeddings and run.long_context == "off":
        raise UserError(
            f"rows have length={run.length} tokens; the model has max_position_embeddings "
            f"{config.max_position_embeddings}: shorten them, raise start.max_position_embeddings, or set long_context"
        )
    return config


def _promised(checkpoint: str, path: Path | None) -> ModelConfig | None:
    """The architecture of what a configuration in the same folder writes to `checkpoint`; None where none does."""
    if path is None or (Path(checkpoint) / "config.json").is_file():
        return None
    for file in sorted(path.parent.glob("*.py")):
        if file.resolve() == path.resolve():
            continue
        other = runpy.run_path(str(file)).get("config")
        if not isinstance(other, Run | Upcycle) or other.out / "hf" != Path(checkpoint):
            continue
        if isinstance(other, Upcycle):
            return sparse_config(_promised(other.checkpoint, file) or named(other.checkpoint), other.experts)
        return of_run(other, file)
    return None
