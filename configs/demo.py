# SPDX-License-Identifier: Apache-2.0
"""The bundled demo: a 2.3 M parameter Qwen2 from nothing, on two CPU cores.

    python train.py configs/demo.py
"""

from pathlib import Path

from qwen2_jax.config import ModelConfig
from qwen2_jax.train import DemoData, Evaluation, Muon, Optim, Pretrain, Shares, Stage

config = Pretrain(
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
    ),
    data=DemoData(
        vocabulary=2000,
        stages=(
            Stage(steps=600, rows=32, length=64, shares=Shares(worksheet=0.3, copy=0.35, sums=0.2, recall=0.15)),
            Stage(
                steps=700,
                rows=16,
                length=128,
                shares=Shares(worksheet=0.15, chat=0.3, copy=0.1, recall=0.25, recall_named=0.05, text=0.15),
            ),
            Stage(
                steps=1300,
                rows=4,
                length=512,
                shares=Shares(
                    worksheet=0.25, chat=0.35, sums=0.1, copy=0.1, recall=0.12, recall_named=0.03, text=0.15
                ),
            ),
        ),
    ),
    optim=Optim(lr=3e-3, muon=Muon(lr=0.02)),
    evaluation=Evaluation(every=100, rows=4),
    out=Path("runs/demo"),
)
