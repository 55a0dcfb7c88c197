# SPDX-License-Identifier: Apache-2.0
"""Host memory, measured in other processes: loading adds next to nothing to the model, converting holds a few arrays.

The promise is one tensor shard + 1 GiB. A checkpoint that a test can afford fits into that gigabyte more than once, so
the bounds here are far tighter, and the size of the groups that Orbax is given is scaled down with the checkpoint.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

import checkpoint.hf_folders as hf

MIB = 2**20
CONFIG = hf.DENSE | {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}  # 320 MiB in bfloat16; the largest tensor has 32 MiB, a stacked parameter 64

SCRIPT = """
import resource, sys
import jax
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats import orbax_folder as orbax
orbax.GROUP_BYTES = 16 * 2**20
root, jobs = sys.argv[1], sys.argv[2:]
jax.devices()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if jobs[0] == "convert":
    checkpoint.convert(f"{root}/hf", f"{root}/orbax", "orbax")
    checkpoint.convert(f"{root}/orbax", f"{root}/again", "hf")
    resident = 0
else:
    params = checkpoint.load_params(f"{root}/{jobs[0]}", dtype=jobs[1], unroll=jobs[2] == "unrolled")
    jax.block_until_ready(params)
    resident = sum(p.nbytes for p in jax.tree.leaves(params))
print(peak() - before, resident)
"""


def measure(root, *jobs: str) -> tuple[int, int]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, root, *jobs], capture_output=True, text=True, check=False, env=env
    )
    assert run.returncode == 0, run.stderr
    more, resident = map(int, run.stdout.split())
    return more, resident


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    tensors = {
        n: np.resize(np.arange(1009, dtype=np.uint16) + 0x3C00, s).view(hf.BF16)
        for n, s in hf.tensors_of(CONFIG).items()
    }
    hf.write_folder(root / "hf", CONFIG, tensors, shards=2)
    del tensors
    return root


@pytest.mark.slow
def test_memory(root):
    more, _ = measure(root, "convert")
    assert more < 200 * MIB, more / MIB
    for file in (root / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (root / "again" / file.name).read_bytes()

    for where, dtype, form, slack in (
        ("hf", "bfloat16", "stacked", 40),
        ("orbax", "bfloat16", "stacked", 250),
    ):
        more, resident = measure(root, where, dtype, form)
        assert more < resident + slack * MIB, (where, dtype, form, more / MIB, resident / MIB)
