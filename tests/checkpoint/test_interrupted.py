# SPDX-License-Identifier: Apache-2.0
"""A folder appears whole or not at all, and a conversion that was stopped can simply be run again."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import store, workspace


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("where", ["first tensor", "last tensor", "manifest", "rename"])
def test_stopped_anywhere(tmp_path, dense, monkeypatch, to, where):
    """As after a kill: nothing is cleaned up. No target, what is left is no checkpoint, a second run succeeds."""
    target, count = tmp_path / "out", 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    def stop_at(name, array, _inner=store.Hasher.start):
        nonlocal count
        count += 1
        if count == (1 if where == "first tensor" else len(hf.tensors_of(hf.DENSE))):
            stop()
        return _inner(hasher, name, array)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.shutil, "rmtree", lambda *_, **__: None)
        if where == "manifest":
            patch.setattr(store, "_write_files", stop)
        elif where == "rename":
            patch.setattr(workspace.os, "replace", lambda a, b: stop() if str(b) == str(target) else os.rename(a, b))
        else:
            hasher = store.Hasher()
            patch.setattr(store, "Hasher", lambda: hasher)
            hasher.start = stop_at
        with pytest.raises(KeyboardInterrupt):
            checkpoint.convert(dense, target, to)

    assert not target.exists()
    left = tmp_path / "out.unfinished"
    assert left.is_dir()
    for folder in (target, left, *(p for p in left.iterdir() if p.is_dir())):
        with pytest.raises(checkpoint.CheckpointError, match="unfinished conversion; run the conversion again"):
            checkpoint.locate(folder)
    checkpoint.convert(dense, target, to)
    assert checkpoint.verify(target).damaged == ()
    assert not left.exists()


KILLED = """
import os, signal, sys
from qwen2_jax import checkpoint
def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.convert(sys.argv[1], sys.argv[2], "orbax", progress=progress)
"""


def test_killed(tmp_path, dense):
    result = subprocess.run([sys.executable, "-c", KILLED, dense, tmp_path / "out"], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "out").exists()
    checkpoint.convert(dense, tmp_path / "out", "orbax")
    assert checkpoint.verify(tmp_path / "out").damaged == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_failure_leaves_nothing(tmp_path, dense, monkeypatch, to):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_files", full)
    with pytest.raises(OSError, match="the disk became full; nothing was left behind"):
        checkpoint.convert(dense, tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_too_small_a_disk_is_known_before(tmp_path, dense, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 0\.07 GB of disk and has 0\.00 GB free"):
        checkpoint.convert(dense, tmp_path / "out", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_existing_target_is_kept(tmp_path, dense):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        checkpoint.convert(dense, tmp_path / "out", "hf")
    (tmp_path / "file").write_text("x")
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        checkpoint.convert(dense, tmp_path / "file", "hf")
    with pytest.raises(checkpoint.CheckpointError, match="the source itself"):
        checkpoint.convert(dense, dense / ".." / "dense", "hf")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    checkpoint.convert(dense, tmp_path / "out", "hf")  # an empty folder is filled


def test_a_folder_of_the_users_is_not_removed(tmp_path, dense):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "precious").write_text("x")
    with pytest.raises(checkpoint.CheckpointError, match="is in the way"):
        checkpoint.convert(dense, tmp_path / "out", "hf")
    assert (tmp_path / "out.unfinished" / "precious").exists()


def test_two_writers(tmp_path, dense):
    with workspace.new_folder(tmp_path / "out", 0), pytest.raises(checkpoint.CheckpointError, match="another process"):
        checkpoint.convert(dense, tmp_path / "out", "hf")


@pytest.mark.parametrize(("to", "dtype"), [("gguf", None), ("hf", "int8")])
def test_wrong_arguments(tmp_path, dense, to, dtype):
    with pytest.raises(checkpoint.CheckpointError, match="choose from"):
        checkpoint.convert(dense, tmp_path / "out", to, dtype=dtype)


def test_buckets_are_written_by_copying(dense):
    with pytest.raises(checkpoint.CheckpointError, match="gcloud storage cp"):
        checkpoint.convert(dense, "gs://bucket/out", "orbax")
    assert not Path("gs:").exists()
