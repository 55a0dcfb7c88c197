# SPDX-License-Identifier: Apache-2.0
"""Weights and cache spread over several devices give what one device gives (in a process of its own)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
SCRIPT = """
import sys
import jax, numpy as np
import qwen2_jax
from qwen2_jax.sharding import make_mesh

folder, axes = sys.argv[1], dict(part.split("=") for part in sys.argv[2:])
recorded = np.load(folder + "/golden.npz")
lm = qwen2_jax.load(folder, dtype="float32", mesh=make_mesh(**{name: int(size) for name, size in axes.items()}))
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params)), "nothing was split"
assert np.abs(lm.logits(recorded["tokens"]) - recorded["logits"]).max() < 1e-4
prompts = [row[:n].tolist() for row, n in zip(recorded["prompts"], recorded["prompt_lengths"])]
answers = lm.generate(prompts, max_new_tokens=24, ignore_eos=True)
assert [answer.token_ids for answer in answers] == recorded["generated"].tolist()
"""


@pytest.mark.parametrize(("variant", "axes"), [("dense_untied", "fsdp=2 tensor=2"), ("moe", "tensor=2 expert=2")])
def test_sharded_model_answers_as_recorded(variant, axes):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(GOLDEN / variant), *axes.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
