# SPDX-License-Identifier: Apache-2.0
"""Speedrun, stage 3: a mixture of experts out of the dense model, 16 of width 128, 4 per token, and a shared one.

    python train.py configs/speedrun/upcycle.py

Fine-grained as Qwen2-57B-A14B: experts are narrower than the dense layer (here a quarter of it), and a token meets
twice as many neurons as in the dense model. Nothing is trained.
"""

from pathlib import Path

from qwen2_jax.train import Upcycle, Upcycling

config = Upcycle(
    checkpoint="runs/speedrun/long_context/hf",
    experts=Upcycling(
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=512,
        scale="preserve",
    ),
    out=Path("runs/speedrun/upcycle"),
)
