# SPDX-License-Identifier: Apache-2.0
"""A checkpoint comes back bit for bit on any devices, or its damage is told and the one before it comes back."""

import concurrent.futures
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from rich.console import Console

from few import MANY, slow
from qwen2_jax.errors import UserError
from qwen2_jax.train.state import checkpoints
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints
from qwen2_jax.train.state.fingerprint import fingerprints

IDENTITY = {"model": {"hidden_size": 48, "layers": (1, 2)}, "seed": 0}


class State(NamedTuple):
    step: Any
    params: Any
    optimizer: Any
    ema: Any
    key: Any


def make_state(size: int = 96) -> State:
    """Every kind of leaf and container that a run has, and none: optax's empty and masked ones, no moving average."""
    rng = np.random.default_rng(size)
    params = {
        "embed": {"weight_VD": jnp.asarray(rng.normal(size=(size, 48)), jnp.float32)},
        "stacks": [{"a_RDF": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.bfloat16)}],
        "scale": jnp.float32(0.5),
    }
    mask = {"embed": True, "stacks": False, "scale": True}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask))
    flags = {"seen": jnp.asarray([True, False]), "data": jnp.arange(7, dtype=jnp.uint8)}
    return State(jnp.int32(3), params, (tx.init(params), flags), None, jnp.asarray([1, 2**31], jnp.uint32))


STATE = make_state()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def at(step: int) -> State:
    return STATE._replace(step=jnp.int32(step))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@contextlib.contextmanager
def opened(folder, identity=IDENTITY, settings=None, meanings=None, **config):
    """Checkpoints, and as their attribute `said` a function that gives what was printed."""
    console = Console(record=True, file=io.StringIO(), width=500)
    told = {"settings": settings, "meanings": meanings}
    with Checkpoints(folder, Checkpointing(**config), identity=identity, console=console, **told) as run:
        run.said = lambda: console.export_text(clear=False)
        yield run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with opened(folder) as run:
        for step in (3, 4):
            run.save(step, at(step), {"tokens": step * 100})
    return folder


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


def test_round_trip(folder):
    with opened(folder) as run:
        found = run.restore(abstract(STATE))
    assert (found.step, found.extras) == (4, {"tokens": 400})
    assert_same(found.state, at(4))
    assert run.said() == ""


def test_nothing_there(tmp_path):
    with opened(tmp_path / "new") as run:
        assert run.restore(abstract(STATE)) is None
        assert run.steps() == []


def test_saving_outlives_donated_buffers(tmp_path):
    """The next steps may overwrite the state's buffers while the files are still being written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    state = step({f"w{n}": jnp.full((256, 1024), float(n)) for n in range(8)})
    with opened(tmp_path) as run:
        run.save(1, state)
        first = state = step(state)
        for _ in range(10):
            state = step(state)
        jax.block_until_ready(state)
        run.wait()
        found = run.restore(abstract(state))
    assert all(leaf.is_deleted() for leaf in first.values()), "nothing was donated: the test shows nothing"
    assert_same(found.state, {f"w{n}": jnp.full((256, 1024), n * 1.5 + 1) for n in range(8)})


def test_keep_rules(tmp_path):
    with opened(tmp_path, keep_last=2, keep_every=4) as run:
        for step in range(1, 8):
            run.save(step, {"x": jnp.int32(step)})
        run.wait()
        assert run.steps() == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "7"]


def test_due(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    state = {"x": jnp.int32(0)}
    with opened(tmp_path, every_steps=5, every_minutes=2) as run:
        assert [step for step in range(1, 11) if run.due(step)] == [5, 10]
        now += 119
        assert not run.due(3)
        now += 2
        assert run.due(3)
        run.save(3, state)
        assert not run.due(3) and not run.due(4)  # the clock starts anew
        run.save(5, state)
        assert not run.due(5)
        run.save(5, state)  # as at the end of a run: saved already
    with opened(tmp_path, every_steps=None, every_minutes=None) as run:
        now += 1e9
        assert not any(map(run.due, range(1, 20)))


def damage(kind: str, path: Path) -> None:
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "emptied":
        os.truncate(path, 0)
    else:
        flip(path, path.stat().st_size // 2, 3)


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("about/data.json", "deleted truncated emptied flipped"),
        ("state/ocdbt.process_0/d/*", "deleted truncated emptied flipped"),
        *slow(
            ("state/_METADATA", "deleted truncated emptied"),
            ("state/manifest.ocdbt", "deleted truncated emptied flipped"),
            ("state/d/*", "deleted truncated emptied flipped"),
        ),
    ],
)
def test_damage_falls_back(two, tmp_path, name, kinds):
    for kind in kinds.split():
        folder = shutil.copytree(two, tmp_path / kind)
        (path,) = (folder / "4").glob(name)
        damage(kind, path)
        with opened(folder) as run:
            found = run.restore(abstract(STATE))
            assert_same(found.state, at(3))
            assert f"warning: checkpoint {folder / '4'} is damaged: " in run.said()
            assert (folder / "4.damaged").is_dir() and run.steps() == [3]
            run.save(4, at(4))
    with opened(folder) as run:
        assert_same(run.restore(abstract(STATE)).state, at(4))


def test_changed_contents_are_named(folder):
    """A flipped bit of a weight, in a format that would load it without a word."""
    weights = np.asarray(STATE.params["embed"]["weight_VD"]).tobytes()
    (path,) = (folder / "4" / "state" / "ocdbt.process_0" / "d").iterdir()
    flip(path, path.read_bytes().index(weights) + 1000, 0)
    with opened(folder) as run:
        assert run.restore(abstract(STATE)).step == 3
        assert "the contents of params/embed/weight_VD are not what was saved" in run.said()


def test_any_flipped_bit_is_seen_or_harmless(folder, tmp_path):
    rng = random.Random(0)
    files = sorted(path.relative_to(folder) for path in (folder / "4").rglob("*") if path.is_file())
    sizes = [(folder / path).stat().st_size for path in files]
    fell_back = 0
    for n in range(14):
        (name,) = rng.choices(files, sizes) if n % 2 else [rng.choice(files)]
        if size := (folder / name).stat().st_size:
            copy = shutil.copytree(folder, tmp_path / str(n))
            flip(copy / name, rng.randrange(size), rng.randrange(8))
            with opened(copy) as run:
                found = run.restore(abstract(STATE))
            assert_same(found.state, at(found.step))
            assert found.extras == {"tokens": found.step * 100}
            fell_back += found.step == 3
    assert fell_back >= 5


@pytest.mark.parametrize("what", ["empty folder", "no metadata", "a file"])
def test_not_a_checkpoint(folder, what):
    if what == "no metadata":
        (folder / "4" / "_CHECKPOINT_METADATA").unlink()
    else:
        shutil.rmtree(folder / "4")
        (folder / "4").mkdir() if what == "empty folder" else (folder / "4").write_text("?")
    with opened(folder) as run:
        assert run.restore(abstract(STATE)).step == 3
        assert "4 is damaged" in run.said()


def test_leftovers_of_a_killed_run(folder):
    shutil.copytree(folder / "4", folder / "7.orbax-checkpoint-tmp")
    (folder / "2.deleting" / "state").mkdir(parents=True)
    with opened(folder) as run:
        assert run.restore(abstract(STATE)).step == 4
        assert run.said() == ""
        run.save(7, at(7))
    assert sorted(path.name for path in folder.iterdir()) == ["4", "7"]


def test_all_damaged(folder):
    for step in ("3", "4"):
        damage("truncated", folder / step / "about" / "data.json")
    told = r"none of the checkpoints .* step 4: .*not JSON; step 3: .*--no-resume"
    with opened(folder) as run, pytest.raises(UserError, match=told):
        run.restore(abstract(STATE))
    assert run.steps() == [3, 4], "nothing was moved: the fault may lie elsewhere"


def test_another_configuration(folder):
    other = {"model": {"hidden_size": 64, "layers": [1, 2]}, "seed": 0, "data": "new"}
    with opened(folder, other) as run:
        told = r"model.hidden_size: 48 -> 64; data: None -> 'new'\. .*--out or --no-resume"
        with pytest.raises(UserError, match=told):
            run.restore(abstract(STATE))
    with opened(folder) as run:  # an equal identity, but arrays that do not fit
        with pytest.raises(UserError, match=r"params/embed/weight_VD: 'float32\[96,48\]' -> 'float32\[97,48\]'"):
            run.restore(abstract(make_state(97)))
        with pytest.raises(UserError, match=r"step: 'int32\[\]' -> None"):
            run.restore({"params": abstract(STATE.params)})


def test_digests_are_told_in_words(folder):
    """Items of a list are compared one by one, so that the one that differs can be named."""
    digests = IDENTITY | {"tokens": ["aa", "bb"]}
    with opened(folder, digests) as run:
        run.save(5, at(5))
    told = r"\(checkpoint -> this run\): the data of b\.txt has changed\. Give"
    words = {"tokens.0": "the data of a.txt has changed", "tokens.1": "the data of b.txt has changed"}
    changed = opened(folder, digests | {"tokens": ["aa", "cc"]}, meanings=words)
    with changed as run, pytest.raises(UserError, match=told):
        run.restore(abstract(STATE))


def test_changed_settings_are_told(tmp_path):
    settings = {"optim": {"lr": 1e-3}, "sources": ({"weight": 0.5}, {"weight": 0.5}), "out": "a", "log": {"every": 1}}
    with opened(tmp_path, settings=settings) as run:
        run.save(1, {"x": jnp.int32(0)})
    changed = {"optim": {"lr": 1e-4}, "sources": ({"weight": 0.5}, {"weight": 0.7}), "out": "b", "log": {"every": 2}}
    with opened(tmp_path, settings=changed) as run:
        assert run.restore({"x": abstract(jnp.int32(0))}).step == 1
    assert run.said().splitlines() == [
        "warning: changed since the checkpoint: optim.lr 0.001 -> 0.0001",
        "warning: changed since the checkpoint: sources.1.weight 0.5 -> 0.7",
    ]
    with opened(tmp_path, settings=settings) as run:
        run.restore({"x": abstract(jnp.int32(0))})
    assert run.said() == ""


@pytest.mark.parametrize("version", [None, 3])
def test_versions(folder, version):
    """Without a version it is the first one, which is still read; a later one belongs to a later program."""
    path = folder / "4" / "about" / "data.json"
    about = json.loads(path.read_text())["about"]
    assert about.pop("version") == 2
    if version is None:
        del about["settings"]
    else:
        about["version"] = version
    path.write_text(json.dumps({"about": about, "crc32": checkpoints._crc32(about)}))
    with opened(folder) as run:
        if version is None:
            assert_same(run.restore(abstract(STATE)).state, at(4))
        else:
            with pytest.raises(UserError, match="another version of this program: its format is 3, .* reads 1, 2"):
                run.restore(abstract(STATE))


def test_starting_over_keeps_the_old_run(folder):
    (folder.parent / "lines").write_text("of the old run")
    with opened(folder) as run:
        with pytest.raises(UserError, match="holds a checkpoint of step 4, made by another run"):
            run.save(1, at(1))
        run.start_over(folder.parent / "lines", folder.parent / "nothing")
        assert run.steps() == [] and "checkpoints.old" in run.said()
        run.save(1, at(1))
    assert sorted(path.name for path in folder.with_name("checkpoints.old").iterdir()) == ["3", "4", "lines"]
    assert not (folder.parent / "lines").exists()


@contextlib.contextmanager
def small_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_file_too_large(tmp_path):
    check_failed_write(tmp_path / "checkpoints", small_files(), "too large")


def test_full_disk(tmp_path):
    with small_disk(tmp_path / "disk"):
        check_failed_write(tmp_path / "disk" / "checkpoints", contextlib.nullcontext(), "No space left")


def check_failed_write(folder, limit, reason):
    small, large = {"x": jnp.arange(1000)}, {"x": jnp.arange(500_000)}
    told = f"step 2 could not be written.*{reason}.*Intact: step 1"
    with opened(folder, keep_last=1) as run:
        run.save(1, small)
        with limit:
            run.save(2, large)  # waits for the first one
            concurrent.futures.wait([run._writing])
            with pytest.raises(OSError, match=told):
                run.due(3)
        assert [path.name for path in folder.iterdir()] == ["1"], "the half-written one was not removed"
        assert_same(run.restore(abstract(small)).state, small)
        run.save(2, small)  # the same step again, now that there is room
    assert run.steps() == [2]


def test_a_folder_that_cannot_be_made(tmp_path):
    """Orbax would report it in a thread of its own, and wait minutes for it when the process ends."""
    with opened(tmp_path / "checkpoints") as run:
        run.save(1, {"x": jnp.int32(1)})
        run.wait()
        os.rename(tmp_path / "checkpoints", tmp_path / "elsewhere")
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(OSError, match=r"step 2 could not be written to .*: .*Not a directory.*GB were free there"):
            run.save(2, {"x": jnp.int32(2)})
        os.unlink(tmp_path / "checkpoints")
        with pytest.raises(OSError, match="No such file or directory.*There is no other one"):
            run.save(2, {"x": jnp.int32(2)})
        os.rename(tmp_path / "elsewhere", tmp_path / "checkpoints")
        run.save(2, {"x": jnp.int32(2)})
    assert run.steps() == [1, 2]
    (tmp_path / "checkpoints" / "3.probe").mkdir()  # of a run that was killed
    with opened(tmp_path / "checkpoints") as run:
        assert sorted(path.name for path in run.folder.iterdir()) == ["1", "2"]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def refuse(path, **options):
        if str(path).endswith(".deleting"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", refuse)
        with opened(tmp_path, keep_last=1) as run:
            for step in (1, 2):
                run.save(step, {"x": jnp.int32(step)})
            run.wait()
            told = f"warning: {tmp_path / '1'} is no longer needed and cannot be removed: "
            assert told in run.said() and "Device or resource busy" in run.said()
        with opened(tmp_path) as run:  # nor does it keep one from starting
            assert run.restore({"x": abstract(jnp.int32(0))}).step == 2
    with opened(tmp_path) as run:
        assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_the_free_space_is_what_it_was_when_writing_failed(tmp_path, monkeypatch):
    there, usage = [], shutil.disk_usage
    half = tmp_path / "2.orbax-checkpoint-tmp"

    def disk_usage(path):
        there.append(half.exists())
        return usage(path)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", disk_usage)
    with pytest.raises(OSError, match="GB were free there"), opened(tmp_path) as run:
        fail_to_save(run)
    assert there == [True] and not half.exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied")])
def test_a_disk_that_cannot_read_is_damage_and_a_missing_right_is_not(folder, monkeypatch, error):
    read = Path.read_bytes

    def fail(path):
        if path.name == "data.json" and path.parents[1].name == "4":
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with opened(folder) as run:
        if isinstance(error, PermissionError):
            with pytest.raises(PermissionError):
                run.restore(abstract(STATE))
        else:
            assert run.restore(abstract(STATE)).step == 3
            assert "4 is damaged: 4/about/data.json cannot be read ([Errno 5] Input/output error)" in run.said()


def fail_to_save(run, then=None):
    with small_files():
        run.save(2, {"x": jnp.arange(500_000)})
        concurrent.futures.wait([run._writing])
    if then is not None:
        raise then


def test_failed_last_write_does_not_hide_what_ended_the_run(tmp_path):
    with pytest.raises(OSError, match="step 2 could not be written"), opened(tmp_path) as run:
        fail_to_save(run)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        fail_to_save(run, KeyboardInterrupt)
    assert "step 2 could not be written" in run.said() and "There is no other one" in run.said()


LEAVES = {
    "f32": jnp.asarray([[0.0, -0.0, 1.5], [2.0, jnp.inf, 1.5]], jnp.float32),
    "bf16": jnp.linspace(-3, 3, 12, dtype=jnp.bfloat16).reshape(2, 3, 2),
    "f16": jnp.zeros(5, jnp.float16),
    "i32": jnp.arange(-4, 4),
    "u8": jnp.zeros((3, 3), jnp.uint8),
    "i8": jnp.arange(-3, 3, dtype=jnp.int8),
    "bool": jnp.asarray([True, False, True]),
    "scalar": jnp.float32(0.0),
    "key": jax.random.key(3),
}
PRINTS = fingerprints(LEAVES)


@settings(MANY, max_examples=150)
@given(st.data())
def test_any_flipped_bit_changes_the_fingerprint(data):
    name = data.draw(st.sampled_from(sorted(LEAVES)))
    keys = name == "key"
    array = np.array(jax.random.key_data(LEAVES[name]) if keys else LEAVES[name])
    flat = array.reshape(-1).view(f"u{array.itemsize}")
    place = data.draw(st.integers(0, flat.size - 1))
    flat[place] ^= 1 << data.draw(st.integers(0, 0 if name == "bool" else 8 * flat.itemsize - 1))
    changed = jax.random.wrap_key_data(array) if keys else jnp.asarray(array)
    got = fingerprints(LEAVES | {name: changed})
    assert {other for other in LEAVES if got[other] != PRINTS[other]} == {name}


@MANY
@given(st.data())
def test_order_and_pairs_of_signs_change_the_fingerprint(data):
    """Two flipped signs, and a value moved to another place, would pass a sum of bits times odd weights."""
    array = np.zeros((4, 6), np.float32)
    old = fingerprints({"x": jnp.asarray(array)})
    i, j = data.draw(st.lists(st.integers(0, 23), min_size=2, max_size=2, unique=True))
    array.flat[i] = -0.0
    one = fingerprints({"x": jnp.asarray(array)})
    array.flat[j] = -0.0
    both = fingerprints({"x": jnp.asarray(array)})
    array.flat[i] = 0.0
    moved = fingerprints({"x": jnp.asarray(array)})
    assert len({tuple(found.items()) for found in (old, one, both, moved)}) == 4


def test_what_has_no_fingerprint():
    with pytest.raises(TypeError, match="complex64"):
        fingerprints({"x": jnp.zeros(3, jnp.complex64)})


EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from rich.console import Console
from qwen2_jax.parallel.sharding import make_mesh
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints
from qwen2_jax.train.state.fingerprint import fingerprints

def places(a, b):
    mesh = make_mesh(fsdp=a, tensor=b)
    specs = {"w": P("fsdp", "tensor"), "m": P(None, ("tensor", "fsdp")), "b": P("tensor"), "n": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

def abstract(where):
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n]) for n, x in host.items()}

def run():
    return Checkpoints(sys.argv[1], Checkpointing(), identity={}, console=Console(stderr=True))

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
host = {"w": rng.normal(size=(16, 24)).astype("f4"), "m": rng.normal(size=(3, 16)).astype(jnp.bfloat16),
        "b": np.arange(8, dtype="i4"), "n": np.int32(5)}
one = {name: SingleDeviceSharding(jax.devices()[3]) for name in host}
values = {}
for where in (places(2, 4), places(4, 2), places(8, 1), one):
    values[str(where)] = fingerprints({n: jax.device_put(x, where[n]) for n, x in host.items()})
assert len(values) == 4 and len({tuple(v.items()) for v in values.values()}) == 1, values
for step, (old, new) in enumerate([(places(2, 4), places(4, 2)), (places(8, 1), one), (one, places(2, 4))], 1):
    with run() as saving:
        saving.save(step, {n: jax.device_put(x, old[n]) for n, x in host.items()})
    with run() as loading:
        found = loading.restore(abstract(new))
    assert found.step == step
    for name, want in host.items():
        assert found.state[name].sharding == new[name], name
        assert np.asarray(found.state[name]).tobytes() == want.tobytes(), name
print(float(host["w"].sum()))
"""


def test_other_meshes(tmp_path):
    """2x4 to 4x2, 8 to one and one to 8 devices; then what 8 devices saved, in this process with its one."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = (
        EIGHT
        + """
with run() as saving:
    saving.save(9, {n: jax.device_put(x, places(2, 4)[n]) for n, x in host.items()})
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    like = {"w": jnp.zeros((16, 24)), "m": jnp.zeros((3, 16), jnp.bfloat16), "b": jnp.zeros(8, "i4"), "n": jnp.int32(0)}
    with opened(tmp_path, {}) as run:
        found = run.restore(abstract(like))
    assert found.step == 9 and found.state["n"] == 5
    assert float(np.asarray(found.state["w"]).sum()) == float(done.stdout)


def test_about_is_readable(two):
    """What a person finds in the folder: JSON with the step, the identity and the shapes."""
    about = json.loads((two / "4" / "about" / "data.json").read_text())["about"]
    assert about["identity"] == {"model": {"hidden_size": 48, "layers": [1, 2]}, "seed": 0}
    assert about["arrays"]["params/stacks/0/a_RDF"] == "bfloat16[3,4,5]"


@pytest.mark.parametrize(
    ("field", "value"), [("every_steps", 0), ("every_minutes", -1.0), ("keep_last", 0), ("keep_every", 0)]
)
def test_configuration(field, value):
    with pytest.raises(UserError, match=field):
        Checkpointing(**{field: value})
