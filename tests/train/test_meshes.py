# SPDX-License-Identifier: Apache-2.0
"""Loss, router statistics and the gradient of every weight are the same on every mesh, packed rows included.

Eight devices, in a process of its own for each model, whose gradient on one device is computed once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SCRIPT = """
import dataclasses, sys
import jax, numpy as np
from qwen2_jax import lora, sharding
from qwen2_jax.config import DualChunk, ModelConfig
from qwen2_jax.lora import Lora
from qwen2_jax.train import Start, step
from test_step import RUN, assert_close, random_batch
from tiny import CONFIGS, random_params

LENGTH, ROWS = 32, 16
SIZES = {"hidden_size": 64, "head_dim": 8, "vocab_size": 128, "num_hidden_layers": 2}
CHUNKS = {"dual_chunk_attention_config": DualChunk(chunk_size=12, local_size=3, original_max_position_embeddings=0)}
CASES = {
    "heads 14:2": ("dense", {"num_attention_heads": 14, "num_key_value_heads": 2}, {}),
    "heads 28:4": ("untied", {"num_attention_heads": 28, "num_key_value_heads": 4}, {}),
    "heads 6:3": ("dense", {"num_attention_heads": 6, "num_key_value_heads": 3}, {"accumulate": 2}),
    "dual chunk": ("dense", CHUNKS, {"long_context": "dca"}),
    "yarn": ("dense", {"max_position_embeddings": 16}, {"long_context": "yarn", "accumulate": 2}),
    "sliding": ("sliding", {"num_hidden_layers": 4}, {"remat": "full"}),
    "moe": ("moe", {"num_experts": 8}, {}),
    "moe mixed": ("moe_mixed", {"num_experts": 8, "num_hidden_layers": 4, **CHUNKS}, {"long_context": "dca"}),
    "adapters": ("dense", {"num_attention_heads": 14}, {"lora": Lora(rank=2), "lora_base": "float32"}),
}
base, sizes, changes = CASES[sys.argv[1]]
config = dataclasses.replace(CONFIGS[base], **SIZES | sizes)
if "lora" in changes:
    changes = changes | {"model": None, "tokenizer": None, "start": Start(checkpoint="none is read here")}
else:
    changes = changes | {"model": config}
run = dataclasses.replace(RUN, rows=ROWS, length=LENGTH, **changes)
batch = random_batch(rows=ROWS, length=LENGTH, vocabulary=128)


def results(mesh):
    trainer = step.Trainer(run, config, 20, mesh=mesh)
    # Half as large as elsewhere: with sharper scores rounding alone moves a gradient by 3e-4 of its size.
    params, frozen = jax.tree.map(lambda x: x * 0.5, random_params(config)), None
    if mesh is not None:
        params = jax.device_put(params, step.places_of(trainer.model_specs, mesh))
    if run.lora is not None:
        frozen = params
        params = lora.init(config, run.lora, jax.random.key(0))
        # The b of a new adapter is zero, and a would have no gradient.
        params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, params)
        if mesh is not None:
            params = jax.device_put(params, trainer.shardings.params)
    gradients = jax.jit(sharding.on(mesh, lambda params, frozen, batch: trainer._gradients(params, frozen, batch)))
    return gradients(params, frozen, trainer.place(batch))


alone = results(None)
for text in sys.argv[2:]:
    mesh = sharding.make_mesh(**{name: int(size) for name, size in (part.split("=") for part in text.split())})
    assert_close(results(mesh), alone, 5e-6)
    print(text, "equal")
"""


@pytest.mark.parametrize(
    ("case", "meshes"),
    [
        ("heads 14:2", ["tensor=8", "fsdp=2 tensor=4", "context=2 tensor=4"]),
        ("heads 28:4", ["tensor=8", "data=2 fsdp=2 tensor=2"]),
        ("heads 6:3", ["fsdp=2 context=2 tensor=2"]),  # key heads are filled up, not repeated
        ("dual chunk", ["context=8", "fsdp=2 context=4", "context=4 tensor=2"]),
        ("yarn", ["replica=2 data=2 context=2"]),
        ("sliding", ["context=4 tensor=2", "replica=2 fsdp=2 context=2"]),
        ("moe", ["expert=8", "expert=4 tensor=2", "fsdp=2 expert=2 context=2", "replica=2 data=2 expert=2"]),
        ("moe mixed", ["fsdp=2 expert=2 tensor=2", "expert=2 context=2 tensor=2"]),
        ("adapters", ["fsdp=2 tensor=4"]),
    ],
)
def test_a_mesh_changes_no_gradient(case, meshes):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "train")]),
    }
    command = [sys.executable, "-c", SCRIPT, case, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == len(meshes)
