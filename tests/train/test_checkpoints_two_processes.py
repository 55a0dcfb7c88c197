# SPDX-License-Identifier: Apache-2.0
"""The state of a run, saved by two processes and restored by two and by one, on other meshes, bit for bit."""

import pytest

import processes

RUN = """
import sys
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rich.console import Console
from qwen2_jax.parallel.sharding import make_mesh
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints

rng = np.random.default_rng(0)
host = {"w": rng.standard_normal((512, 1024), np.float32), "m": rng.standard_normal((3, 256, 512)).astype("bfloat16"),
        "b": np.arange(8, dtype=np.int32), "n": np.int32(5)}
SPLIT = 512 * 1024 * 4 + 3 * 256 * 512 * 2

def places(**axes):
    mesh = make_mesh(**axes)
    where = {"w": P("tensor", "fsdp"), "m": P(None, "fsdp", "tensor"), "b": P("tensor"), "n": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in where.items()}

def put(where):
    return {n: jax.make_array_from_callback(x.shape, where[n], lambda index, x=x: np.asarray(x)[index])
            for n, x in host.items()}

def same(state):
    for name, x in state.items():
        for shard in x.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(host[name])[shard.index].tobytes(), name

config = Checkpointing(every_minutes=None)

def opened():
    return Checkpoints(root / "checkpoints", config, identity={}, console=Console(stderr=True))

def restore(**axes):
    "The step, and the bytes that this process read for it."
    where = places(**axes)
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n]) for n, x in host.items()}
    with opened() as run:
        before = bytes_read()
        found = run.restore(like)
        same(found.state)
        assert all(found.state[n].sharding == where[n] for n in host)
        return found.step, bytes_read() - before

def save(step, **axes):
    "The bytes that this process wrote for it."
    before = bytes_written()
    with opened() as run:
        run.save(step, put(places(**axes)))
    return bytes_written() - before
"""

TWO = (
    RUN
    + """
restored = []
if (root / "checkpoints" / "20").exists():
    restored.append(restore(fsdp=4, tensor=1))
    written = save(30, fsdp=2, tensor=2)
else:
    save(9, fsdp=2, tensor=2)  # imports
    written = save(10, fsdp=2, tensor=2)
restored += [restore(fsdp=2, tensor=2), restore(tensor=4, fsdp=1)]
tell(written=written, restored=restored, split=SPLIT)
"""
)

ONE = (
    RUN
    + """
found = [restore(fsdp=1, tensor=2)]
save(20, fsdp=2, tensor=1)
tell(restored=found)
"""
)

SMALL = 250_000  # bytes of Orbax's own files and of ours


@pytest.mark.slow  # quick: other meshes in test_checkpoints.py; two processes save one step in test_hosts.py
def test_two_processes_and_one_continue_each_other(tmp_path):
    """Two processes with four devices, one with two, two with four again. Each writes and reads its own half."""
    two = processes.run(TWO, tmp_path)
    half = two[0]["split"] / 2
    for told in two:
        assert half < told["written"] < half + SMALL
        (step, same_mesh), (_, other_mesh) = told["restored"]
        assert step == 10
        assert half < same_mesh < half + SMALL
        assert other_mesh < 2 * half + SMALL  # pieces on disk are shards of the mesh that saved, read whole
    (one,) = processes.run(ONE, tmp_path, count=1)
    assert one["restored"][0][0] == 10
    two = processes.run(TWO, tmp_path)
    for told in two:
        assert [step for step, _ in told["restored"]] == [20, 30, 30]
        assert half < told["written"] < half + SMALL
