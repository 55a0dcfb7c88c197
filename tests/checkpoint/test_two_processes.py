# SPDX-License-Identifier: Apache-2.0
"""Two real processes with two devices each: who reads and writes which bytes, and that the results are those of one.

The processes are started once, for all tests.
"""

import pytest

import checkpoint.hf_folders as hf
import processes
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import byte_plan, peft
from qwen2_jax.checkpoint.formats import orbax_folder
from qwen2_jax.model import lora

# Quick: test_sharded.py, where one process reads the shares of its devices, and a run's state of two processes
# (tests/train/test_checkpoints_two_processes.py).
pytestmark = pytest.mark.slow

ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")  # hold the time
CONFIG = hf.SPARSE | {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}

READ = """
import dataclasses
import numpy as np
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.transfer import load as fill
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.weights.params import leaves
from qwen2_jax.parallel.sharding import make_mesh

def share(tree):
    "Bytes of the parameters that this process holds, each once."
    return sum({(path, str(s.index)): s.data.nbytes for path, x in leaves(tree) for s in x.addressable_shards}.values())

def check(tree):
    for path, x in leaves(tree):
        for s in x.addressable_shards:
            assert np.asarray(s.data).tobytes() == np.asarray(names.get(whole, path)[s.index]).tobytes(), path

opened = checkpoint.open_checkpoint(root / "hf")
half = jax.numpy.dtype("bfloat16")
specs = names.nested({path: dataclasses.replace(spec, dtype=half) for path, spec in leaves(opened.specs)})
whole = checkpoint.load_params(root / "hf")
checkpoint.load_params(root / "orbax")  # imports Orbax's many modules
read = []
for axes, stages in ((dict(fsdp=2, tensor=2), (None, 0)), (dict(expert=2, fsdp=2), (None,))):
    mesh = make_mesh(**axes)
    reads = []
    for stage in stages:
        opened.tensors.bytes_read = 0
        tree = fill.read_params(opened.tensors, specs, fill.param_shardings(mesh), stage_bytes=stage)
        check(tree)
        reads.append(opened.tensors.bytes_read)
    before = bytes_read()
    again = checkpoint.load_params(root / "orbax", mesh=mesh)
    read.append(dict(share=share(tree), hf=reads, orbax=bytes_read() - before))
    check(again)
"""

ADAPTERS = """
import numpy as np
from qwen2_jax.model import lora
from qwen2_jax.parallel import sharding
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint import peft
from qwen2_jax.weights.params import leaves

def adapters(config, settings, mesh):
    "Low-rank adapters, on a mesh or not."
    def made(spec, seed):
        whole = np.random.default_rng(seed).standard_normal(spec.shape, np.float32)
        if mesh is None:
            return whole
        where = sharding.sharding(spec.axes, spec.shape, mesh)
        return jax.make_array_from_callback(spec.shape, where, lambda index: whole[index])
    return names.nested({p: made(s, seed) for seed, (p, s) in enumerate(leaves(lora.declare(config, settings)))})
"""

WRITE = (
    ADAPTERS
    + """
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats import hf_folder, orbax_folder as orbax
from qwen2_jax.checkpoint.transfer import gather as pieces, write as writing
from qwen2_jax.parallel.sharding import make_mesh

params = checkpoint.load_params(root / "hf", mesh=make_mesh(fsdp=2, tensor=2))
pieces.PIECE_BYTES = 100_000
folders, written, real, put = [], 0, hf_folder.HfFolder, writing.write_all

def opened(path):
    folders.append(real(path))
    return folders[-1]

def counted(file, parts):
    global written
    written += sum(memoryview(part).nbytes for part in parts)
    put(file, parts)

hf_folder.HfFolder, writing.write_all = opened, counted
found = {}

def measure(name, function, *args, **more):
    global written
    folders.clear(); written = 0
    before, out = bytes_read(), bytes_written()
    function(*args, **more)
    found[name] = dict(read=sum(f.bytes_read for f in folders), files=bytes_read() - before)
    found[name] |= dict(written=written, all_written=bytes_written() - out)

config = checkpoint.read_config(checkpoint.locate(root / "hf"))
more = dict(tokenizer_files_from=root / "hf")
measure("save", checkpoint.save_hf, root / "two" / "hf", config, params, max_shard_bytes=1_500_000, **more)
checkpoint.save_hf(root / "two" / "hf", config, params, dtype="float32", replace=True, **more)
checkpoint.save_orbax(root / "two" / "orbax", config, params, **more)
measure("hf to hf", checkpoint.convert, root / "hf", root / "two" / "hf-hf", "hf")
measure("hf to orbax", checkpoint.convert, root / "hf", root / "two" / "hf-orbax", "orbax")
orbax.GROUP_BYTES = 1 << 20  # the processes have different numbers of groups to read
measure("orbax to hf", checkpoint.convert, root / "orbax", root / "two" / "orbax-hf", "hf")
orbax.GROUP_BYTES = 1 << 22
checkpoint.convert(root / "orbax", root / "two" / "orbax-float16", "orbax", dtype="float16")
settings = lora.Lora(rank=4, targets=("q_proj", "v_proj"))
spread = adapters(config, settings, make_mesh(fsdp=2, tensor=2))
assert not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(spread))
peft.save_peft(root / "two" / "adapters", config, spread, settings, "base")
hf_folder.HfFolder, writing.write_all = real, put
"""
)

FAIL = """
import errno
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.transfer import multihost as processes, write as writing
from qwen2_jax.parallel.sharding import make_mesh

processes.APPEARS_SECONDS = 0.5
params = checkpoint.load_params(root / "hf", mesh=make_mesh(fsdp=2, tensor=2))
config = checkpoint.read_config(checkpoint.locate(root / "hf"))
said = []

def attempt(path, **more):
    try:
        checkpoint.save_hf(path, config, params, **more)
        said.append("")
    except (checkpoint.CheckpointError, OSError) as why:
        said.append(str(why))

attempt(root / f"disk of {me}" / "a")  # as if each host had a disk of its own there
put = writing.write_all
def full(file, parts):
    if me == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    put(file, parts)
writing.write_all = full
attempt(root / "b")
writing.write_all = put
if me == 0:
    (root / "c").mkdir()
    (root / "c" / "precious").touch()
attempt(root / "c")
attempt(root / "d")
tell(read=read, wrote=found, said=said)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    hf.write_folder(root / "hf", CONFIG, hf.random_tensors(CONFIG), shards=2)
    with pytest.MonkeyPatch.context() as patch:
        # as small to these arrays as the real pieces are to real ones
        patch.setattr(orbax_folder, "CHUNK_BYTES", 1 << 14)
        patch.setattr(orbax_folder, "ROW_BYTES", 1 << 10)
        checkpoint.convert(root / "hf", root / "orbax", "orbax")
    return root


@pytest.fixture(scope="module")
def told(root):
    """What the two processes found when they read, wrote and failed, one after the other."""
    return processes.run(READ + WRITE + FAIL, root, timeout=360)


SIZE = sum(tensor.nbytes for tensor in hf.random_tensors(CONFIG).values())
SMALL = 400_000  # bytes of Orbax's own files, about 30 KB at each call; nothing to a checkpoint of some size


def test_each_process_reads_its_share(root, told):
    """Once, whatever the mesh splits; and the two shares are the whole, but for what both processes hold."""
    a, b = (process["read"] for process in told)
    for found in (*a, *b):
        assert set(found["hf"]) == {found["share"]}
        assert found["share"] <= found["orbax"] < found["share"] + SMALL
    folder = byte_plan.declared(root / "hf")
    for i, mesh in enumerate(({"fsdp": 2, "tensor": 2}, {"expert": 2, "fsdp": 2})):
        assert byte_plan.load_step(folder, "hf", mesh, 2).reads == (a[i]["share"], b[i]["share"])
    assert a[0]["share"] == b[0]["share"]
    assert SIZE <= 2 * a[0]["share"] < 1.001 * SIZE  # both hold the biases
    assert SIZE < a[1]["share"] + b[1]["share"] < 2 * SIZE  # the mesh has "expert" between the processes


def test_what_two_processes_write_is_what_one_writes(root, told):
    """Byte for byte, and each wrote half of it."""
    a, b = (process["wrote"] for process in told)
    for found in (a, b):
        for name in ("save", "hf to hf", "orbax to hf"):
            assert abs(found[name]["written"] - SIZE / 2) < 8000, name  # the first writes the headers as well
        assert found["hf to hf"]["read"] == SIZE / 2
        assert found["hf to orbax"]["read"] == SIZE  # rows to write, and then whole tensors to hash
    folder, arrays = byte_plan.declared(root / "hf"), byte_plan.declared(root / "orbax")
    assert byte_plan.convert_step(folder, "hf", 2).reads == (a["hf to hf"]["read"], b["hf to hf"]["read"])
    assert byte_plan.convert_step(folder, "orbax", 2).reads == (a["hf to orbax"]["read"], b["hf to orbax"]["read"])
    planned = byte_plan.convert_step(arrays, "hf", 2)
    for found, reads, writes in zip((a, b), planned.reads, planned.writes, strict=True):
        assert reads < found["orbax to hf"]["files"] < reads + SMALL
        assert 0 <= found["orbax to hf"]["written"] - writes < 8000
    for found, writes in zip((a, b), byte_plan.convert_step(folder, "orbax", 2).writes, strict=True):
        assert writes < found["hf to orbax"]["all_written"] < writes + SMALL
    config, params = checkpoint.read_config(checkpoint.locate(root / "hf")), checkpoint.load_params(root / "hf")
    more = {"tokenizer_files_from": root / "hf"}
    checkpoint.save_hf(root / "one" / "hf", config, params, dtype="float32", **more)
    checkpoint.save_orbax(root / "one" / "orbax", config, params, **more)
    checkpoint.convert(root / "orbax", root / "one" / "orbax-float16", "orbax", dtype="float16")
    scope: dict = {}
    exec(ADAPTERS, scope)
    settings = lora.Lora(rank=4, targets=("q_proj", "v_proj"))
    peft.save_peft(root / "one" / "adapters", config, scope["adapters"](config, settings, None), settings, "base")
    assert hf.files_of(root / "two" / "adapters") == hf.files_of(root / "one" / "adapters")
    for two, one in (
        ("hf", root / "one" / "hf"), ("hf-hf", root / "hf"), ("orbax-hf", root / "hf"),
    ):  # fmt: skip
        assert hf.files_of(root / "two" / two) == hf.files_of(one), two
        assert checkpoint.verify(root / "two" / two).damaged == (), two
    for two, one in (
        ("orbax", root / "one" / "orbax"), ("hf-orbax", root / "orbax"),
        ("orbax-float16", root / "one" / "orbax-float16"),
    ):  # fmt: skip
        assert checkpoint.verify(root / "two" / two).damaged == (), two
        assert hf.files_of(root / "two" / two, but=ORBAX) == hf.files_of(one, but=ORBAX)  # the manifest is one of them


def test_an_error_of_one_process_is_an_error_of_all(root, told):
    """Nothing is left behind, nobody waits for ever, and the next attempt works."""
    a, b = (process["said"] for process in told)
    assert "failed in process 1, see its message" in a[0]
    assert "process 1 does not see" in b[0] and "give a path on a disk that all of them mount" in b[0]
    assert "writing" in a[1] and "failed in process 1" in a[1]
    assert "No space left" in b[1]
    assert "exists already" in a[2] and "failed in process 0" in b[2]
    assert (a[3], b[3]) == ("", "")
    assert not list((root / "disk of 0").iterdir()) and not (root / "b").exists()
    assert not list(root.glob("*.unfinished"))
    assert checkpoint.verify(root / "d").damaged == ()
