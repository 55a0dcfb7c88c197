# SPDX-License-Identifier: Apache-2.0
"""From a run's configuration to what its loop needs: architecture, tokenizer, data, mesh and the number of steps."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.data.tokens.loader import Loaded, open_data
from qwen2_jax.errors import UserError
from qwen2_jax.model import rope
from qwen2_jax.parallel import sharding
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from qwen2_jax.train.config import Mesh, Pretrain, Run
from qwen2_jax.train.post_training_config import Dpo, Online, Reward

# What may not change when a run is continued: the arrays in its checkpoints, and the order of its data.
FIXED = ("lora", "rows", "length", "seed")
SMALL_FILES = "tokenizer"  # folder in the run's, with the files that travel beside the weights
NOT_COPIED = ("config.json", "README.md")  # written anew; about another model


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can be started. source: the checkpoint it starts from, or None. Nothing but tokens is written yet."""

    run: Run
    config: ModelConfig
    source: checkpoint.Source | None
    tokenizer: Tokenizer
    tokenizer_files: checkpoint.Source  # where the tokenizer comes from
    data: Loaded | Prompts
    held_out: dict[str, Loaded | Prompts]  # name -> data
    steps: int
    mesh: jax.sharding.Mesh | None
    sampling_mesh: jax.sharding.Mesh | None = None  # where Online runs draw answers; None as above

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued by this run, as JSON."""
        run = {name: getattr(self.run, name) for name in FIXED}
        optim: dict[str, Any] = {"algorithm": self.run.optim.algorithm, "muon": self.run.optim.muon is not None}
        if (merging := self.run.optim.merging) is not None:  # what its task vector was made for lies in the state
            optim["merging"] = {n: getattr(merging, n) for n in ("method", "variant", "keep", "every", "rescale")}
        run["ema"] = self.run.ema is not None
        data: dict[str, Any] = {"tokens": self.data.identity}
        if isinstance(self.run.data, Data):
            data["packing"], data["too_long"] = self.run.data.packing, self.run.data.too_long
            data["sources"] = [[s.weight, s.min_tokens, s.max_tokens] for s in self.run.data.sources]
        if isinstance(self.run, Online):
            run |= {name: getattr(self.run, name) for name in ("prompts", "updates", "iterations")}
            # Where answers are drawn changes none of them.
            run["sampling"] = {n: v for n, v in dataclasses.asdict(self.run.sampling).items() if n != "mesh"}
        whole = {"model": self.config.to_hf(), "run": run, "optim": optim, "data": data}
        return json.loads(json.dumps(whole, default=_plain))

    @property
    def meanings(self) -> dict[str, str]:
        """What to say where the identity differs in digests, which tell a person nothing."""
        data = self.run.data
        paths = [s.path for s in data.sources] if isinstance(data, Data) else [", ".join(data.sources)]
        said = {f"data.tokens.{i}": f"the data of {p} has changed, or the tokenizer has" for i, p in enumerate(paths)}
        said["base"] = (
            "the weights under the adapters are others than those that the checkpoint's adapters were trained on: give "
            "the same start.checkpoint and lora_base"
        )
        return said

    @property
    def settings(self) -> dict[str, Any]:
        """The run's whole configuration as JSON, for a checkpoint to keep."""
        return json.loads(json.dumps(dataclasses.asdict(self.run), default=str))  # str: of paths

    @property
    def row_parts(self) -> int:
        """Devices, or groups of them, that a batch's rows are divided among."""
        return _parts("batch", self.mesh)

    @property
    def files(self) -> checkpoint.Source:
        """The folder with the small files of the result."""
        return checkpoint.Source("hf", self.run.out / SMALL_FILES)

    def write_small_files(self) -> None:
        """Tokenizer and generation settings, as the result will have them: a chat model's answers end at <|im_end|>.

        Only the run that holds the folder may: a result is made of what lies there when it is written.
        """
        folder = self.files.path
        folder.mkdir(parents=True, exist_ok=True)
        source, end = self.tokenizer_files, self.tokenizer.token_id(IM_END)
        contents = {name: source.read_bytes(name) or b"" for name in source.small_files() if name not in NOT_COPIED}
        if not isinstance(self.run, Pretrain) and end is not None:
            for name, changes in (
                ("tokenizer_config.json", {"eos_token": IM_END}),
                ("generation_config.json", {"eos_token_id": [end, self.tokenizer.token_id(END_OF_TEXT)]}),
            ):
                old = json.loads(contents.get(name, b"{}"))
                contents[name] = (json.dumps(old | changes, indent=2, ensure_ascii=False) + "\n").encode()
        for name, data in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def prepare(run: Run, console: Console) -> Job:
    """Reads and checks everything that can be known before the first step; writes nothing but the cache of tokens.

    Raises UserError for what contradicts itself, before anything is computed.
    """
    if isinstance(run, Online) and jax.process_count() > 1:
        raise UserError(
            f"{type(run).__name__} samples its answers in one process, and {jax.process_count()} are here: give "
            "--processes 1 on a machine that holds the model, or train on rankings with Dpo"
        )
    source = None if run.start is None else checkpoint.locate(run.start.checkpoint)
    files = _tokenizer_files(run.tokenizer) if source is None or run.tokenizer is not None else source
    tokenizer = Tokenizer.from_folder(files.path)
    config = _architecture(run, source, tokenizer)
    mesh = sampling_mesh = _mesh(run.mesh)
    if isinstance(run, Online) and run.sampling.mesh is not None:
        sampling_mesh = _mesh(run.sampling.mesh)
    if run.rows % (pieces := run.accumulate * _parts("batch", mesh)):
        raise UserError(
            f"rows={run.rows} cannot be cut into {run.accumulate} micro-batches for {_parts('batch', mesh)} parts of "
            f"the mesh ({' x '.join(sharding.RULES['batch'])}): choose rows as a multiple of {pieces}"
        )
    if run.length % _parts("length", mesh):
        raise UserError(
            f"length={run.length} cannot be cut into the {_parts('length', mesh)} parts of the mesh's context axis: "
            f"choose a multiple of {2 * _parts('length', mesh)}, which also gives the parts equal work"
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
    if isinstance(run, Reward | Dpo):
        data, held_out = _ranked(run, data, held_out)
    elif ranked := [name for name, one in {"data": data, **held_out}.items() if getattr(one, "ranks", 1) > 1]:
        raise UserError(
            f"{', '.join(ranked)}: rankings, of which this run would learn the rejected answers too; they are for Dpo "
            "and Reward. For fine-tuning give messages, or prompt and completion"
        )
    return Job(run, config, source, tokenizer, files, data, held_out, steps, mesh, sampling_mesh)


def _ranked(run: Run, data: Any, held_out: dict[str, Any]) -> tuple[Loaded, dict[str, Loaded | Prompts]]:
    """The data with segments numbered alike: by the most responses that any prompt has."""
    ranks = max(loaded.ranks for loaded in (data, *held_out.values()))
    if isinstance(run, Dpo) and ranks > 2:
        raise UserError(
            f"DPO learns from pairs, and there are prompts with {ranks} responses: give pairs (chosen and rejected), "
            "or train a reward model on these"
        )
    return data.with_ranks(ranks), {name: loaded.with_ranks(ranks) for name, loaded in held_out.items()}


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
    if config.scores and not isinstance(run, Reward):
        raise UserError(
            f"{source.path if source else 'model'} is a reward model, which writes no answers; start from the chat "
            "model that it was made from, and give it as reward_model where it is to judge"
        )
    if isinstance(run, Reward) and config.score_head is None:
        config = dataclasses.replace(config, score_head=run.head)
    if run.long_context == "yarn":  # what the weights get used to belongs to the result
        config = dataclasses.replace(config, rope_scaling=rope.yarn_scaling(config, run.length))
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
    """None on one device, where nothing is to be divided."""
    sizes = wanted.sizes(len(jax.devices()))
    return None if math.prod(sizes.values()) == len(jax.devices()) == 1 else sharding.make_mesh(**sizes)


def _parts(name: str, mesh: jax.sharding.Mesh | None) -> int:
    """Into how many parts a mesh cuts the dimension called `name`."""
    return 1 if mesh is None else sharding.parts(sharding.axes_of(name, mesh), mesh)


def _tokenizer_files(name: str | None) -> checkpoint.Source:
    """A checkpoint, or a folder that holds nothing but a tokenizer."""
    if name is None:  # the configuration has refused that already
        raise UserError("a model from random weights needs a tokenizer")
    folder = Path(name).expanduser()
    if (folder / "tokenizer.json").exists():
        return checkpoint.Source("hf", folder)
    return checkpoint.locate(name)


def _plain(value: Any) -> Any:
    """Dataclasses and paths for JSON."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
