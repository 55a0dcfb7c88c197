# SPDX-License-Identifier: Apache-2.0
"""What test_meshes.py asks of a worker (tests/worker.py) with eight devices: gradients on meshes, and on one device."""

import dataclasses

import jax
from test_step import RUN, assert_close, random_batch

from qwen2_jax.config import DualChunk
from qwen2_jax.model import lora
from qwen2_jax.model.lora import Lora
from qwen2_jax.parallel import sharding
from qwen2_jax.train import Start, step
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


def equal(case: str, meshes: list[str]) -> None:
    """Gradients and statistics on each of the meshes are those of one device."""
    base, sizes, changes = CASES[case]
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
            params = jax.device_put(params, step.shardings_of(trainer.model_specs, mesh))
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
    for text in meshes:
        mesh = sharding.make_mesh(**{name: int(size) for name, size in (part.split("=") for part in text.split())})
        assert_close(results(mesh), alone, 5e-6)
