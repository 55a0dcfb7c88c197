# SPDX-License-Identifier: Apache-2.0
"""The table of formats that are read. The first that recognises a folder or a file opens it."""

from collections.abc import Collection
from typing import Any

from qwen2_jax.checkpoint.formats import gguf, hf_folder, orbax_folder, quantised_folder
from qwen2_jax.checkpoint.formats.protocol import Format

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        orbax_folder.FORMAT,
        quantised_folder.FORMAT,
        hf_folder.FORMAT,
        gguf.FORMAT,
    )
}


def recognise(path: Any, names: Collection[str] = ()) -> Format | None:
    """The format of the folder or file at `path`, None if it has none of them. names: of the files in the folder."""
    return next((one for one in FORMATS.values() if one.looks_like(path, names)), None)
