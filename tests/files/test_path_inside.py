# SPDX-License-Identifier: Apache-2.0
"""A name that somebody else wrote never leads out of the folder that it is joined to."""

import pytest
from etils import epath

from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.path_inside import path_inside

RULE = "only .safetensors files beside the index are read"


def refusal(folder, name, **more) -> str:
    with pytest.raises(UserError) as caught:
        path_inside(folder, name, "the index", RULE, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "/etc/passwd", "../x", "a/../x", "a/b", "a/", "./a", "a\\b", "..\\x", "C:x", "c:\\x", "a\0",
        "a\nb", "\ud800", "x" * 256, None, 7, ["a"], b"a", "templates/../x", "templates//x", "templates/",
        "templates/a/b", "/templates/x", "templates/C:x", "templates/..",
    ],
)  # fmt: skip
def test_no_name_of_another_place(tmp_path, name):
    text = refusal(tmp_path, name, subfolders=("templates",))
    assert text.startswith("the index names ") and text.endswith(RULE) and len(text) < 250


def test_names_of_files_of_the_folder(tmp_path):
    for name in ("model.safetensors", "a b", "..x", "x..", "\u00e9", "x" * 255, "1:2"):
        assert path_inside(tmp_path, name, "the index", RULE, writing=True) == tmp_path / name
    inside = path_inside(tmp_path, "templates/rag.jinja", "the index", RULE, subfolders=("templates",), writing=True)
    assert inside == tmp_path / "templates" / "rag.jinja"
    bucket = epath.Path("gs://bucket/folder")
    assert path_inside(bucket, "config.json", "the index", RULE) == bucket / "config.json"
    assert "names .gs://other/x." in refusal(bucket, "gs://other/x").replace("'", ".")


def test_the_suffix_and_the_class_of_the_error(tmp_path):
    for name in ("model.bin", ".safetensors", "model.safetensors.bin"):
        refusal(tmp_path, name, suffix=".safetensors")
    with pytest.raises(CheckpointError):
        path_inside(tmp_path, "..", "the index", RULE)
    with pytest.raises(UserError) as caught:
        path_inside(tmp_path, "..", "the index", RULE, error=UserError)
    assert not isinstance(caught.value, CheckpointError)


def test_links_are_followed_for_reading_only(tmp_path):
    """The Hub's cache is made of links; nothing is written through one."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "templates").symlink_to(elsewhere)
    (folder / "config.json").symlink_to(elsewhere / "config.json")  # not there yet
    for name in ("config.json", "templates/x"):
        path_inside(folder, name, "the index", RULE, subfolders=("templates",))
        assert "symbolic link" in refusal(folder, name, subfolders=("templates",), writing=True)
