# SPDX-License-Identifier: Apache-2.0
"""A run that is ready to start: architecture, tokenizer, data, mesh and number of steps. prepare.py creates it."""

import dataclasses
import functools
import json
from typing import Any

import jax

from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats.small_files import small_file
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.spec import Data
from qwen2_jax.data.tokens.loader import Loaded
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.parallel import sharding
from qwen2_jax.tokenizer import END_OF_TEXT, Tokenizer
from qwen2_jax.train.config import Run
from qwen2_jax.train.result_folders import SMALL_FILES

NOT_COPIED = ("config.json", "README.md")  # one is written anew, the other describes another model


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A run that is ready to start. source: the checkpoint it starts from, or None. Only tokens have been written."""

    run: Run
    config: ModelConfig
    source: checkpoint.Source | None
    tokenizer: Tokenizer
    tokenizer_files: checkpoint.Source  # where the tokenizer comes from
    data: Loaded | Prompts
    held_out: dict[str, Loaded | Prompts]  # name -> data
    steps: int
    mesh: jax.sharding.Mesh | None
    sampling_mesh: jax.sharding.Mesh | None = None  # where Online runs sample answers; None as above

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and data that a checkpoint must share for this run to continue it, as JSON."""
        optim: dict[str, Any] = {"algorithm": self.run.optim.algorithm, "muon": self.run.optim.muon is not None}
        if (merging := self.run.optim.merging) is not None:  # the state holds the task vector, which depends on these
            optim["merging"] = {n: getattr(merging, n) for n in ("method", "variant", "keep", "every", "rescale")}
        data: dict[str, Any] = {"tokens": self.data.identity}
        if isinstance(self.run.data, Data):
            data["packing"], data["too_long"] = self.run.data.packing, self.run.data.too_long
            data["sources"] = [[s.weight, s.min_tokens, s.max_tokens] for s in self.run.data.sources]
        whole = {"model": self.config.to_hf(), "run": self.run.fixed(), "optim": optim, "data": data}
        return json.loads(json.dumps(whole, default=_plain))

    @property
    def meanings(self) -> dict[str, str]:
        """Messages for fields of the identity that are digests, whose values explain nothing."""
        data = self.run.data
        paths = [s.path for s in data.sources] if isinstance(data, Data) else [", ".join(data.sources)]
        messages = {
            f"data.tokens.{i}": f"the data of {p} has changed, or the tokenizer has" for i, p in enumerate(paths)
        }
        messages["base"] = (
            "the weights below the adapters differ from those that the checkpoint's adapters were trained on: give the "
            "same start.checkpoint and lora_base"
        )
        return messages

    @property
    def settings(self) -> dict[str, Any]:
        """The run's whole configuration as JSON, for a checkpoint to keep."""
        return json.loads(json.dumps(dataclasses.asdict(self.run), default=str))  # str: of paths

    @property
    def row_parts(self) -> int:
        """Number of parts that the mesh divides a batch's rows into."""
        return parts("batch", self.mesh)

    @property
    def files(self) -> checkpoint.Source:
        """The folder with the small files of the result."""
        return checkpoint.Source("hf", self.run.out / SMALL_FILES)

    @functools.cached_property
    def answer_end(self) -> int | None:
        """The id of the special token that the chat template writes behind an answer; None if there is none."""
        answer = "The answer."
        talk = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        try:
            _, found, behind = self.tokenizer.render_chat(talk, add_generation_prompt=False).rpartition(answer)
        except UserError:  # no template, or one for other conversations
            return None
        first = self.tokenizer.encode(behind.lstrip())[:1] if found else []
        return first[0] if first and first[0] in self.tokenizer.special_ids else None

    def write_small_files(self) -> None:
        """Tokenizer and generation settings, as the result will have them: a chat model's texts end as its answers do.

        Only the run that holds the folder may: a result is made of what lies there when it is written.
        """
        folder = self.files.path
        folder.mkdir(parents=True, exist_ok=True)
        source, end = self.tokenizer_files, self.answer_end
        contents = {name: source.read_bytes(name) or b"" for name in source.small_files() if name not in NOT_COPIED}
        if self.run.answers and end is not None:
            ends = dict.fromkeys(id for id in (end, self.tokenizer.token_id(END_OF_TEXT)) if id is not None)
            changed: dict[str, dict[str, Any]] = {"generation_config.json": {"eos_token_id": [*ends]}}
            if "eos_token" not in (self.tokenizer.chat_template or ""):  # which would render another text with it
                changed["tokenizer_config.json"] = {"eos_token": self.tokenizer.decode([end], False)}
            for name, changes in changed.items():
                old = parse_json_object(contents.get(name, b"{}"), f"{source.path} {name}")
                contents[name] = (json.dumps(old | changes, indent=2, ensure_ascii=False) + "\n").encode()
        for name, data in contents.items():
            file = small_file(folder, name, str(source.path), writing=True)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)


def parts(name: str, mesh: jax.sharding.Mesh | None) -> int:
    """The number of parts that a mesh divides the dimension called `name` into."""
    return 1 if mesh is None else sharding.parts(sharding.axes_of(name, mesh), mesh)


def _plain(value: Any) -> Any:
    """Dataclasses and paths for JSON."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
