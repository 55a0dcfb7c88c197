# SPDX-License-Identifier: Apache-2.0
"""The small files of a checkpoint: config, tokenizer, chat templates, generation settings, licence; never code."""

from pathlib import Path
from typing import Any, Protocol

from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.files.path_inside import path_inside
from qwen2_jax.files.regular_file import is_regular_file

CONFIG, GENERATION, MANIFEST, LAYOUT = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "safetensors_layout.json",
)
SUFFIXES = (".json", ".txt", ".jinja", ".model", ".md")  # of the files that are copied
MAX_BYTES = 100_000_000  # larger files are not copied
MAX_JSON_BYTES = 100_000_000
SUBFOLDERS = ("additional_chat_templates",)
REPORT = "gptq_report.json"  # how `convert --to gptq` rounded
NOT_COPIED = (MANIFEST, LAYOUT, REPORT, "commit_success.txt")  # written anew; the last is Orbax's


def small_file(folder: Any, name: str, where: str, *, writing: bool = False) -> Any:
    """The path of a small file, whose name may come from a stranger. Arguments and error: see path_inside."""
    rule = f"a checkpoint's small files lie in its folder or in {', '.join(SUBFOLDERS)}"
    return path_inside(folder, name, where, rule, subfolders=SUBFOLDERS, writing=writing)


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
                if file.name in SUBFOLDERS:
                    names += sorted(f"{file.name}/{f.name}" for f in file.iterdir() if f.name.endswith(".jinja"))
            elif (file.name.endswith(SUFFIXES) or file.name.upper().startswith(("LICENSE", "NOTICE"))) and not (
                file.name in NOT_COPIED or file.name.endswith((".safetensors.index.json", ".bin.index.json"))
            ):
                if _size(file) <= MAX_BYTES:
                    names.append(file.name)
        return names

    def read_bytes(self, name: str, limit: int | None = None) -> bytes | None:
        file = small_file(self.path, name, str(self.path))
        if not is_regular_file(file, CheckpointError):
            return None
        if limit is not None and _size(file) > limit:
            raise CheckpointError(f"{file} is larger than {limit} bytes; that is no {name}")
        return file.read_bytes()


def read_json(path: Any, files: SmallFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name` of the checkpoint at `path`, None where there is none."""
    content = files.read_bytes(name, MAX_JSON_BYTES)
    if content is None:
        return None
    return parse_json_object(content, str(path / name), CheckpointError)


def _size(file: Any) -> int:
    """In bytes; 0 in a bucket, which is not asked."""
    return file.stat().st_size if isinstance(file, Path) else 0
