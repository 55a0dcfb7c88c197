# SPDX-License-Identifier: Apache-2.0
"""One dense checkpoint as a fixture; the other kinds are made by hf_folders."""

from pathlib import Path

import pytest

import checkpoint.hf_folders as hf


@pytest.fixture
def dense(tmp_path) -> Path:
    """A dense, untied checkpoint in one bfloat16 file."""
    return hf.write_folder(tmp_path / "dense", hf.DENSE, hf.random_tensors(hf.DENSE))
