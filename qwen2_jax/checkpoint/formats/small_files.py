# SPDX-License-Identifier: Apache-2.0
"""The small files of a checkpoint: config, tokenizer, chat templates, generation settings, licence; never code."""

import json
from pathlib import Path
from typing import Any, Protocol

from qwen2_jax.errors import CheckpointError

CONFIG, GENERATION, MANIFEST, LAYOUT = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "safetensors_layout.json",
)
SUFFIXES = (".json", ".txt", ".jinja", ".model", ".md")  # of the files that are copied
MAX_BYTES = 100_000_000  # larger files are not copied
MAX_JSON_BYTES = 100_000_000
NOT_COPIED = (MANIFEST, LAYOUT, "commit_success.txt")  # written anew; the last is Orbax's


class SmallFiles(Protocol):
    """The small files of one checkpoint, which may exist only as parts of a larger file."""

    def names(self) -> list[str]:
        """Of those that are copied when the checkpoint is converted or saved."""

    def read_bytes(self, name: str, limit: int | None = None) -> bytes | None:
        """The contents of one, also of those that are not copied; None where there is none of this name.

        Raises CheckpointError for a file larger than `limit` bytes.
        """


class FolderFiles:
    """The small files of a folder. path: a Path, or an epath.Path for gs://."""

    def __init__(self, path: Any):
        self.path = path

    def names(self) -> list[str]:
        names = []
        for file in sorted(self.path.iterdir(), key=lambda f: f.name):
            if file.is_dir():
                if file.name == "additional_chat_templates":
                    names += sorted(f"{file.name}/{f.name}" for f in file.iterdir() if f.name.endswith(".jinja"))
            elif (file.name.endswith(SUFFIXES) or file.name.upper().startswith(("LICENSE", "NOTICE"))) and not (
                file.name in NOT_COPIED or file.name.endswith((".safetensors.index.json", ".bin.index.json"))
            ):
                if _size(file) <= MAX_BYTES:
                    names.append(file.name)
        return names

    def read_bytes(self, name: str, limit: int | None = None) -> bytes | None:
        file = self.path / name
        if not file.exists():
            return None
        if limit is not None and _size(file) > limit:
            raise CheckpointError(f"{file} is larger than {limit} bytes; that is no {name}")
        return file.read_bytes()


def read_json(path: Any, files: SmallFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name` of the checkpoint at `path`, None where there is none."""
    content = files.read_bytes(name, MAX_JSON_BYTES)
    if content is None:
        return None
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as why:
        raise CheckpointError(f"{path / name} is not valid JSON: {' '.join(str(why).split())[:200]}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path / name} holds a JSON {type(data).__name__} instead of an object")
    return data


def _size(file: Any) -> int:
    """In bytes; 0 in a bucket, which is not asked."""
    return file.stat().st_size if isinstance(file, Path) else 0
