# SPDX-License-Identifier: Apache-2.0
"""Eight fake devices in another process: every byte of a file is read once, and each device gets exactly its share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint.hf_folders as hf

SCRIPT = """
import sys
import jax, numpy as np
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.transfer import load as fill
from qwen2_jax.checkpoint.formats import orbax_folder as orbax
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.parallel.sharding import make_mesh
from pathlib import Path

root = Path(sys.argv[1])
assert len(jax.devices()) == 8
for axes in (dict(fsdp=2, tensor=2, expert=2), dict(expert=4, tensor=2)):
    mesh = make_mesh(**axes)
    opened = checkpoint.open_checkpoint(root / "hf")
    place = fill.param_shardings(mesh)
    ours = fill.read_params(opened.tensors, opened.specs, place)
    size = sum(info.nbytes for info in opened.tensors.infos.values())
    assert opened.tensors.bytes_read == size, (opened.tensors.bytes_read, size)   # shared by replicas, never read twice
    staged = fill.read_params(opened.tensors, opened.specs, place, stage_bytes=0)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(staged), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    for unroll in (axes.get("fsdp") == 2,):
        a = checkpoint.load_params(root / "hf", mesh=mesh, unroll=unroll, dtype="float32")
        b = checkpoint.load_params(root / "orbax", mesh=mesh, unroll=unroll, dtype="float32")
        c = checkpoint.load_params(root / "hf", unroll=unroll, dtype="float32")
        for x, y, z in zip(*map(jax.tree.leaves, (a, b, c)), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
            np.testing.assert_array_equal(x, z)
            np.testing.assert_array_equal(y, z)
    gate = a["stacks"][0]["blocks"][0]["moe"]["gate_EFD"]
    assert gate.addressable_shards[0].data.size * 8 == gate.size

# One device's share alone: only its bytes are asked for.
mesh = make_mesh(fsdp=2, tensor=2, expert=2)
opened = checkpoint.open_checkpoint(root / "hf")
spec = opened.specs["stacks"][0]["blocks"][0]["moe"]["gate_EFD"]
where = fill.param_shardings(mesh)(spec)
class OneHost:
    addressable_devices = {jax.devices()[3]}
    def addressable_devices_indices_map(self, shape):
        return {jax.devices()[3]: where.addressable_devices_indices_map(shape)[jax.devices()[3]]}
calls = []
jax.make_array_from_single_device_arrays = lambda shape, where, arrays: calls.extend(arrays)
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1) as pool:
    fill._read(opened.tensors, spec, OneHost(), pool, None)
assert opened.tensors.bytes_read == np.prod(spec.shape) * 2 // 8, opened.tensors.bytes_read
assert calls[0].shape == where.shard_shape(spec.shape)
print("ok")
"""

SAVE = """
import sys
import jax, numpy as np
from pathlib import Path
from qwen2_jax import checkpoint
from qwen2_jax.parallel.sharding import make_mesh
root = Path(sys.argv[1])
params = checkpoint.load_params(root / "hf", mesh=make_mesh(fsdp=2, tensor=2, expert=2))
config = checkpoint.read_config(checkpoint.locate(root / "hf"))
checkpoint.save_hf(root / "a", config, params, tokenizer_files_from=root / "hf")
checkpoint.save_orbax(root / "b", config, params, tokenizer_files_from=root / "hf")
again = checkpoint.load_params(root / "b")
jax.tree.map(np.testing.assert_array_equal, params, again)
print("ok")
"""


def run(script: str, root: Path) -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=False, env=env)
    assert result.stdout.endswith("ok\n"), result.stderr


CONFIG = hf.SPARSE | {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}


def test_each_device_reads_its_bytes(tmp_path):
    from qwen2_jax import checkpoint

    hf.write_folder(tmp_path / "hf", CONFIG, hf.random_tensors(CONFIG), shards=2)
    checkpoint.convert(tmp_path / "hf", tmp_path / "orbax", "orbax")
    run(SCRIPT, tmp_path)


@pytest.mark.slow
def test_sharded_parameters_are_saved(tmp_path):
    from qwen2_jax import checkpoint

    tensors = hf.random_tensors(CONFIG)
    hf.write_folder(tmp_path / "hf", CONFIG, tensors)
    run(SAVE, tmp_path)
    for folder in ("a", "b"):
        opened = checkpoint.open_checkpoint(tmp_path / folder)
        for name, value in opened.tensors.stream(list(opened.tensors.infos)):
            assert value.tobytes() == tensors[name].tobytes(), name
        assert checkpoint.verify(tmp_path / folder).damaged == ()
