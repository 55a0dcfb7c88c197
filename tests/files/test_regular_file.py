# SPDX-License-Identifier: Apache-2.0
"""What stands in a file's place is named, and nothing waits for a pipe."""

import os
import shutil
from pathlib import Path

import pytest

import qwen2_jax.demo
from qwen2_jax import checkpoint
from qwen2_jax.errors import UserError
from qwen2_jax.files.regular_file import is_regular_file
from qwen2_jax.tokenizer import Tokenizer

DEMO = Path(qwen2_jax.demo.__file__).parent
PLACES = {
    "folder": (lambda path: path.mkdir(), "a folder instead of a file"),
    "pipe": (os.mkfifo, "a pipe or device instead of a file"),
    "broken link": (lambda path: path.symlink_to("blobs/gone"), "a link to blobs/gone, which is not there"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
}


def test_files_and_links_to_files(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    there = [is_regular_file(tmp_path / name) for name in ("file", "link", "none", "file/none")]
    assert there == [True, True, False, False]


def read_all(folder: Path) -> None:
    source = checkpoint.locate(folder)
    checkpoint.read_config(source)
    source.read_json("generation_config.json")
    Tokenizer.from_folder(folder)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_files_of_a_checkpoint(tmp_path, place, name):
    """A checkpoint with a broken link in the place of its settings is not one without settings."""
    for file in DEMO.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").symlink_to(DEMO / "model.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    make, words = PLACES[place]
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}.* {words}"):
        read_all(tmp_path)
