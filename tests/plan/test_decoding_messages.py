# SPDX-License-Identifier: Apache-2.0
"""What decoding and prefill send between devices, compiled by the real compilers: activations, no table and no cache.

The compilers for TPU and GPU make other choices than the one for CPU, which tests/infer/test_mesh.py asks: of one row
XLA:GPU made a look-up in the embedding a gather of the whole of it.
"""

import pytest

from ahead_of_time import GPU_COMPILER, TPU_COMPILER
from few import slow
from qwen2_jax.config import ModelConfig
from qwen2_jax.infer.engine import lowering
from qwen2_jax.plan import hlo, infer, machine

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=32768,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=65536,
    tie_word_embeddings=False,
)
CHUNK, SLOTS = 128, 65536
CHIPS = [  # the GPU's slowly: one program takes half a minute
    pytest.param("4xh100", marks=[*GPU_COMPILER, pytest.mark.slow]),
    pytest.param("v5e-4", marks=TPU_COMPILER),
]


@pytest.mark.parametrize(
    ("rows", "axes"),
    [
        (1, {"context": 2, "tensor": 2}),
        *slow((1, {"tensor": 4}), (2, {"tensor": 4}), (2, {"context": 2, "tensor": 2})),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CHIPS)
def test_only_activations_move(name, rows, axes):
    where = machine.parse(name)
    mesh = machine.mesh_of(where, infer.sizes(axes, where.devices))
    generator = infer.make_generator(CONFIG, mesh, infer.InferenceJob(long_context="dca"))
    token = 3 * 4 * CONFIG.hidden_size  # bytes: three rotated queries or partial sums in float32
    for tokens, (lowered, _) in (
        (rows * CHUNK, lowering.lower_prefill(generator, CHUNK, rows, SLOTS, "dca")),
        (rows, lowering.lower_decode(generator, rows, SLOTS, "dca")),
    ):
        text = lowered.compile().as_text()
        largest = max(hlo.collectives(text, range(where.devices)), key=lambda c: c.bytes)
        assert largest.bytes <= tokens * token < 2 * CONFIG.vocab_size * CONFIG.hidden_size / 8
