# SPDX-License-Identifier: Apache-2.0
"""Makes the helper module of this folder importable under importlib's import mode, and one dense folder as a fixture."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _import(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


folders = _import("hf_folders")


@pytest.fixture
def dense(tmp_path) -> Path:
    """A dense, untied checkpoint in one bfloat16 file."""
    return folders.write_folder(tmp_path / "dense", folders.DENSE, folders.random_tensors(folders.DENSE))
