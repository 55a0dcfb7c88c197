# SPDX-License-Identifier: Apache-2.0
"""Reads a run's configuration: a Python file, and flags that override it."""

import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path

import tyro

from qwen2_jax.data.spec import Source
from qwen2_jax.errors import UserError
from qwen2_jax.train.config import Pretrain, Sft, Upcycle
from qwen2_jax.train.post_training import Dpo, Grpo, OnlineDpo, Reward

Recipe = Pretrain | Sft | Reward | Dpo | OnlineDpo | Grpo | Upcycle


def load(path: Path, flags: Sequence[str] = ()) -> Recipe:
    """The `config` of a Python file, with command-line flags such as ["--optim.lr", "1e-3"] applied.

    Raises UserError when the file is missing or defines no config; wrong flags end the program with exit code 2.
    """
    if not path.is_file():
        raise UserError(f"no config file {str(path)!r}; give the path of a Python file such as configs/sft.py")
    try:
        values = runpy.run_path(str(path))
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as mistake:
        raise UserError(f"{path}: {mistake}") from mistake
    config = values.get("config")
    if not isinstance(config, Recipe):
        raise UserError(f"{path} defines no run: its last line must be `config = Pretrain(...)`, not {config!r:.60}")
    with _sources_as_words():
        return tyro.cli(
            type(config),
            default=config,
            args=list(flags),
            prog=f"train.py {path}",
            description=values["__doc__"],
            config=(tyro.conf.AvoidSubcommands,),
        )


def _sources_as_words() -> tyro.constructors.ConstructorRegistry:
    """Lets a source be one word on the command line: --data.sources chats.jsonl,weight=0.7 books/,weight=0.3"""
    registry = tyro.constructors.ConstructorRegistry()
    fields = [field for field in dataclasses.fields(Source) if field.name != "path"]

    def parse(words: list[str]) -> Source:
        path, *settings = words[0].split(",")
        flags = [f"--{setting}" for setting in settings]
        return tyro.cli(Source, default=Source(path=path), args=flags, prog="a source, PATH[,FIELD=VALUE...]")

    def spell(source: Source) -> list[str]:
        given = {field.name: getattr(source, field.name) for field in fields}
        changed = [f"{f.name}={given[f.name]}" for f in fields if given[f.name] != f.default]
        return [",".join([source.path, *changed])]

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not Source:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH[,FIELD=VALUE...]",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, Source),
            str_from_instance=spell,
        )

    return registry
