# SPDX-License-Identifier: Apache-2.0
"""Weights and cache spread over several devices give what one device gives (in processes of their own)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LOADED = """
import sys
import jax, numpy as np
import qwen2_jax
from qwen2_jax.sharding import make_mesh

folder, axes = sys.argv[1], dict(part.split("=") for part in sys.argv[2].split(","))
recorded = np.load(folder + "/golden.npz")
lm = qwen2_jax.load(folder, dtype="float32", mesh=make_mesh(**{name: int(size) for name, size in axes.items()}))
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params)), "nothing was split"
assert np.abs(lm.logits(recorded["tokens"]) - recorded["logits"]).max() < 1e-4
prompts = [row[:n].tolist() for row, n in zip(recorded["prompts"], recorded["prompt_lengths"])]
answers = lm.generate(prompts, max_new_tokens=24, ignore_eos=True)
assert [answer.token_ids for answer in answers] == recorded["generated"].tolist()
"""


def run(devices, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("variant", "axes"),
    [("dense_untied", "fsdp=2,tensor=2"), ("moe", "expert=2,tensor=2"), ("sliding", "context=2,tensor=2")],
)
def test_sharded_model_answers_as_recorded(variant, axes):
    run(4, "-c", LOADED, str(TESTS / "golden" / variant), axes)


MESHES = [
    ("dense", "fsdp=8"),
    ("dense", "context=8"),
    ("dca", "context=4,tensor=2"),
    ("dca", "data=2,fsdp=2,context=2"),
    ("sliding", "context=4,tensor=2"),
    ("sliding", "data=2,tensor=4"),
    ("moe", "data=2,tensor=4"),
    ("moe", "expert=2,fsdp=2,tensor=2"),
    ("moe", "expert=2,context=2,tensor=2"),
]


@pytest.mark.parametrize(("name", "axes"), MESHES)
def test_a_mesh_answers_as_one_device(name, axes):
    run(8, str(TESTS / "infer/eight_devices.py"), "compare", name, axes)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("dense", "data=2,tensor=4"),
        ("dca", "data=2,context=2,tensor=2"),
        ("sliding", "context=8"),
        ("moe", "expert=2,context=2,tensor=2"),
        ("dense", "fsdp=4,tensor=2"),
    ],
)
def test_neither_tables_nor_caches_move(name, axes):
    """Nor weights, in decoding with fsdp. tests/plan asks the compilers for TPU and GPU."""
    run(8, str(TESTS / "infer/eight_devices.py"), "collectives", name, axes)


def test_the_command_line_takes_a_mesh():
    command = (str(TESTS.parent / "infer.py"), "--raw", "--dtype", "float32", "--max-new-tokens", "12", "--temperature")
    alone = run(8, *command, "0", "What is 11 + 22?")
    assert run(8, *command, "0", "--mesh", "context=-1", "What is 11 + 22?") == alone != ""
