# SPDX-License-Identifier: Apache-2.0
"""The bundled demo: a 2.3 M parameter Qwen2 from nothing, on two CPU cores.

    python train.py configs/demo.py

Takes 42 minutes on two CPU cores that do other work too, for 3000 steps and 6.1 M tokens; less on idle ones. Expected:
loss 1.8 nats per target, 3.6 on held-out documentation; exact greedy answers to 200 held-out items of each skill: sums
99.5%, recall 100%, larger of two 98%, copying 83%, recall by name 29.5% (python -m qwen2_jax.eval.skills).
The text is the standard library of the running Python (3.12 here): another version gives slightly other numbers.
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
            # Short rows first: most tokens per second, and the circuits for addition and copying form without text.
            Stage(steps=600, rows=32, length=64, shares=Shares(worksheet=0.3, copy=0.35, sums=0.2, recall=0.15)),
            Stage(
                steps=600,
                rows=16,
                length=128,
                shares=Shares(
                    worksheet=0.15, chat=0.3, copy=0.1, recall=0.25, recall_named=0.05, text=0.12, story=0.03
                ),
            ),
            Stage(
                steps=1800,
                rows=4,
                length=512,
                shares=Shares(
                    worksheet=0.2, chat=0.33, sums=0.08, copy=0.1, recall=0.1, recall_named=0.03, text=0.22, story=0.04
                ),
            ),
        ),
    ),
    optim=Optim(lr=3e-3, muon=Muon(lr=0.02)),
    evaluation=Evaluation(every=100, rows=4),
    out=Path("runs/demo"),
)
