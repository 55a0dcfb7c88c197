# SPDX-License-Identifier: Apache-2.0
"""Reads a run's configuration: a Python file, and flags that override it."""

import dataclasses
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from qwen2_jax.data.spec import Source
from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train.config import Run, Upcycle

Recipe = Run | Upcycle


def load(path: Path, flags: Sequence[str] = ()) -> Recipe:
    """The `config` of a Python file, with command-line flags such as ["--optim.lr", "1e-3"] applied.

    Raises UserError when the file is missing or defines no config; wrong flags end the program with exit code 2.
    """
    if not path.is_file():
        raise UserError(f"no config file {str(path)!r}; give the path of a Python file such as configs/sft.py")
    try:
        values = _executed(path)
    except UserError:
        raise
    except Exception as mistake:
        lines = [frame.lineno for frame in traceback.extract_tb(mistake.__traceback__) if frame.filename == str(path)]
        other = "; for a function give a RewardFunction of qwen2_jax.rewards" * ("Reward.__init__" in str(mistake))
        known = isinstance(mistake, SyntaxError | ImportError | NameError | TypeError | AttributeError)
        said = (
            " ".join(str(mistake).split()) if known else f"{type(mistake).__name__}: {' '.join(str(mistake).split())}"
        )
        raise UserError(f"{path}{f' line {lines[-1]}' if lines else ''}: {said}{other}") from mistake
    config = values.get("config")
    if not isinstance(config, Recipe):
        raise UserError(
            f"{path} defines no run: its last line must be `config = Sft(...)` or another run, not {config!r:.60}"
        )
    with _as_words():
        return tyro.cli(
            type(config),
            default=config.unfilled(),
            args=list(flags),
            prog=f"train.py {path}",
            description=values["__doc__"],
            config=(tyro.conf.AvoidSubcommands,),
        )


def _executed(path: Path) -> dict[str, Any]:
    """The names that a Python file defines. The file stays importable: tyro looks up dataclasses that it defines."""
    values = runpy.run_path(str(path))
    module = types.ModuleType(values["__name__"])
    vars(module).update(values)
    sys.modules[module.__name__] = module
    return values


def _as_words() -> tyro.constructors.ConstructorRegistry:
    """Reads a source or a reward function from one word: --data.sources chats.jsonl,weight=0.7 --rewards number

    Their other fields, such as a reward's options, can only be given in a config file.
    """
    registry = tyro.constructors.ConstructorRegistry()
    for kind, first in ((Source, "path"), (RewardFunction, "function")):
        registry.primitive_rule(_word(kind, first))
    return registry


def _word(kind: Any, first: str) -> Callable[[Any], tyro.constructors.PrimitiveConstructorSpec | None]:
    """The rule that reads `kind` from a word: the field `first`, then NAME=VALUE after commas."""
    fields = [field for field in dataclasses.fields(kind) if field.name not in (first, "options")]
    shape = f"{first.upper()}[,FIELD=VALUE...]"

    def parse(words: list[str]) -> Any:
        begin, *settings = words[0].split(",")
        flags = [f"--{setting}" for setting in settings]
        return tyro.cli(kind, default=kind(**{first: begin}), args=flags, prog=shape)

    def spell(value: Any) -> list[str]:
        given = {field.name: getattr(value, field.name) for field in fields}
        changed = [f"{f.name}={given[f.name]}" for f in fields if given[f.name] != f.default]
        begin = getattr(value, first)
        return [",".join([begin if isinstance(begin, str) else value.title, *changed])]

    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not kind:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=shape,
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=spell,
        )

    return rule
