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
import tiny
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.transfer import write
from qwen2_jax.files import atomic_folder


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("where", ["first tensor", "last tensor", "manifest", "rename"])
def test_stopped_anywhere(tmp_path, dense, monkeypatch, to, where):
    """As after a kill: nothing is cleaned up. No target, what is left is no checkpoint, a second run succeeds."""
    target, count = tmp_path / "out", 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    def stop_at(name, array, _inner=write.Hasher.start):
        nonlocal count
        count += 1
        if count == (1 if where == "first tensor" else len(hf.tensors_of(hf.DENSE))):
            stop()
        return _inner(hasher, name, array)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.shutil, "rmtree", lambda *_, **__: None)
        if where == "manifest":
            patch.setattr(write, "_write_files", stop)
        elif where == "rename":
            patch.setattr(
                atomic_folder.os, "replace", lambda a, b: stop() if str(b) == str(target) else os.rename(a, b)
            )
        else:
            hasher = write.Hasher()
            patch.setattr(write, "Hasher", lambda: hasher)
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


def model_of(seed: int) -> tuple:
    return tiny.CONFIGS["dense"], tiny.random_params(tiny.CONFIGS["dense"], seed=seed)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["writing", "first rename", "second rename", "removal"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_replaced_folder_is_never_lost(tmp_path, monkeypatch, where, killed):
    """Whatever stops the replacement: the old folder or the new one is there, at the latest after a new start."""
    target, other = tmp_path / "out", tmp_path / "other"
    old = weights_of(checkpoint.save_hf(target, *model_of(0)))
    new = weights_of(checkpoint.save_hf(other, *model_of(1)))
    (target / "only-in-the-old-one").touch()
    renames = iter(range(100))
    replace, rmtree = os.replace, shutil.rmtree

    def stop(*_, **__):
        raise KeyboardInterrupt

    def rename(a, b):
        number = next(renames)
        if (where, number) in (("first rename", 0), ("second rename", 1)) or (killed and number > 1):
            stop()
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.os, "replace", rename)
        if killed:  # nothing is cleaned up
            patch.setattr(atomic_folder.shutil, "rmtree", lambda *_, **__: None)
        if where == "writing":
            patch.setattr(write, "_write_files", stop)
        if where == "removal":
            patch.setattr(atomic_folder.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_hf(target, *model_of(1), replace=True)
    assert shutil.rmtree is rmtree
    if killed and where == "second rename":
        assert not target.exists()  # the one moment in which it has no name
    else:
        assert weights_of(target) == (new if where == "removal" else old)
    if not killed and where != "removal":
        assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []

    with monkeypatch.context() as patch:  # the next start fails as well: the old one is back all the same
        patch.setattr(write, "_write_files", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_hf(target, *model_of(2), replace=True)
    assert weights_of(target) == (new if where == "removal" else old)
    checkpoint.save_hf(target, *model_of(1), replace=True)
    assert weights_of(target) == new
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in other.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_only_folders_are_replaced(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        checkpoint.save_hf(tmp_path / "out", *model_of(0), replace=True)
    checkpoint.save_hf(tmp_path / "hf", *model_of(0))
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        checkpoint.save_hf(tmp_path / "hf", *model_of(0))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells the name of an open file by /proc")
def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """A rename may survive a crash that the files did not: all of them are flushed first, and their names."""
    flushed, named = set(), []
    fsync, replace = os.fsync, os.replace

    def flush(handle):
        flushed.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def rename(a, b):
        named.extend(str(path) for path in (Path(a), *Path(a).rglob("*")) if str(path) not in flushed)
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    checkpoint.save_hf(tmp_path / "out", *model_of(0), max_shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert named == []
    assert str(tmp_path) in flushed


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_failure_leaves_nothing(tmp_path, dense, monkeypatch, to):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_write_files", full)
    with pytest.raises(OSError, match="the disk became full; nothing was left behind"):
        checkpoint.convert(dense, tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_too_small_a_disk_is_known_before(tmp_path, dense, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", lambda _: usage)
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
    with (
        atomic_folder.new_folder(tmp_path / "out", 0),
        pytest.raises(checkpoint.CheckpointError, match="another process"),
    ):
        checkpoint.convert(dense, tmp_path / "out", "hf")


@pytest.mark.parametrize(("to", "dtype"), [("exl2", None), ("hf", "int8"), ("hf", "q8_0"), ("gguf", "q4_k")])
def test_wrong_arguments(tmp_path, dense, to, dtype):
    with pytest.raises(checkpoint.CheckpointError, match="choose from"):
        checkpoint.convert(dense, tmp_path / "out", to, dtype=dtype)


def test_buckets_are_written_by_copying(dense):
    with pytest.raises(checkpoint.CheckpointError, match="gcloud storage cp"):
        checkpoint.convert(dense, "gs://bucket/out", "orbax")
    assert not Path("gs:").exists()
