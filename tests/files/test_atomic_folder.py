# SPDX-License-Identifier: Apache-2.0
"""What cannot be written is refused in one line (interrupted writes: checkpoint/test_interrupted.py)."""

import pytest

from qwen2_jax.errors import CheckpointError, exit_code
from qwen2_jax.files.atomic_folder import new_file, new_folder


@pytest.mark.parametrize("write", [new_file, new_folder])
def test_nothing_is_written_under_a_file(write, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=f"^{file} is a file and not a folder"), write(file / "a" / "b", 1):
        pass
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]


def test_a_failure_of_the_system_is_one_line_without_its_number(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert exit_code(lambda: len((tmp_path / "file" / "x").read_bytes())) == 2
    assert capsys.readouterr().err == f"error: Not a directory: {tmp_path / 'file' / 'x'}\n"
