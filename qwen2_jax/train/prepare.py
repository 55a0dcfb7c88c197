# SPDX-License-Identifier: Apache-2.0
"""From a run's configuration to a TrainingJob: architecture, tokenizer, data, mesh and the number of steps."""

import dataclasses
import math
from pathlib import Path

import jax
from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.data.tokens.loader import Loaded, open_data
from qwen2_jax.errors import UserError
from qwen2_jax.files.atomic_folder import check_folder
from qwen2_jax.model import yarn
from qwen2_jax.parallel import sharding
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.train.config import Mesh, Run
from qwen2_jax.train.job import TrainingJob, parts
from qwen2_jax.train.result_folders import check_inputs_stay
from qwen2_jax.train.stage import stage_of


def prepare(run: Run, console: Console) -> TrainingJob:
    """Reads and checks everything that is known before the first step; writes only the cache of tokens.

    Raises UserError for contradicting settings, before anything is computed.
    """
    stage = stage_of(run)
    stage.check_processes(jax.process_count())
    check_folder(run.out)
    source = None if run.start is None else checkpoint.locate(run.start.checkpoint)
    files = _tokenizer_files(run.tokenizer) if source is None or run.tokenizer is not None else source
    check_inputs_stay(run, None if source is None else source.path, files.path)
    with files.folder_of_small_files() as folder:
        tokenizer = Tokenizer.from_folder(folder)
    config = _architecture(run, source, tokenizer)
    mesh = sampling_mesh = _mesh(run.mesh)
    if stage.sampling_mesh is not None:
        sampling_mesh = _mesh(stage.sampling_mesh)
    if run.rows % (pieces := run.accumulate * parts("batch", mesh)):
        raise UserError(
            f"rows={run.rows} cannot be cut into {run.accumulate} micro-batches for {parts('batch', mesh)} parts of "
            f"the mesh ({' x '.join(sharding.RULES['batch'])}): choose rows as a multiple of {pieces}"
        )
    if run.length % parts("length", mesh):
        raise UserError(
            f"length={run.length} cannot be cut into the {parts('length', mesh)} parts of the mesh's context axis: "
            f"choose a multiple of {2 * parts('length', mesh)}, which also gives the parts equal work"
        )

    def opened(data: Data | PromptData) -> Loaded | Prompts:
        cache = run.out / "tokens"
        if isinstance(data, PromptData):
            return Prompts(data, tokenizer, seed=run.seed, cache=cache)
        return open_data(data, tokenizer, length=run.length, seed=run.seed, cache=cache, console=console)

    data, steps = opened(run.data), run.steps or 1
    if isinstance(data, Loaded):
        steps = run.steps or max(1, math.ceil((run.epochs or 0) * data.rows_per_epoch / run.rows))
        data.epochs(steps, run.rows)  # raises where a source would be repeated too often
    held_out = {}
    for one in run.evaluation.sources:
        name = Path(one.path).name.split(".")[0]
        held_out[one.path if name in held_out else name] = opened(_alone(run.data, one))
    data, held_out = stage.check_data(data, held_out)
    return TrainingJob(run, config, source, tokenizer, files, data, held_out, steps, mesh, sampling_mesh)


def _alone(data: Data | PromptData, source: Source) -> Data | PromptData:
    """A held-out source, read as the data is."""
    if isinstance(data, PromptData):
        return dataclasses.replace(data, sources=(source.path,))
    return dataclasses.replace(data, sources=(source,), too_long="drop" if data.packing == "best_fit" else "cut")


def _architecture(run: Run, source: checkpoint.Source | None, tokenizer: Tokenizer) -> ModelConfig:
    if source is None:
        assert run.model is not None
        config = run.model
    else:
        config = checkpoint.read_config(source)
        changes = {n: getattr(run.start, n) for n in ("rope_theta", "max_position_embeddings")}
        config = dataclasses.replace(config, **{n: v for n, v in changes.items() if v is not None})
    config = stage_of(run).architecture(config, str(source.path) if source else "model")
    if run.long_context == "yarn":  # the result's config names the positions that the weights were trained with
        config = dataclasses.replace(config, rope_scaling=yarn.scaling_for(config, run.length))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the model has vocab_size {config.vocab_size}; the tokenizer has ids up to {tokenizer.vocab_size - 1}: "
            "choose the tokenizer the model was made for, or a larger vocab_size"
        )
    if run.length > config.max_position_embeddings and run.long_context == "off":
        raise UserError(
            f"rows have length={run.length} tokens; the model has max_position_embeddings "
            f"{config.max_position_embeddings}: shorten them, raise start.max_position_embeddings, or set long_context"
        )
    return config


def _mesh(wanted: Mesh) -> jax.sharding.Mesh | None:
    """The mesh; None for one device."""
    sizes = wanted.sizes(len(jax.devices()))
    return None if math.prod(sizes.values()) == len(jax.devices()) == 1 else sharding.make_mesh(**sizes)


def _tokenizer_files(name: str | None) -> checkpoint.Source:
    """The source of a tokenizer: a checkpoint, or a folder that has only a tokenizer."""
    if name is None:  # already refused by the configuration
        raise UserError("a model from random weights needs a tokenizer")
    folder = Path(name).expanduser()
    if (folder / "tokenizer.json").exists():
        return checkpoint.Source("hf", folder)
    return checkpoint.locate(name)
