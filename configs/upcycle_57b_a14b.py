# SPDX-License-Identifier: Apache-2.0
"""Qwen2-57B-A14B's architecture out of Qwen2-7B (Qwen2 report, arXiv:2407.10671, sec. 2.2.2).

    python train.py configs/upcycle_57b_a14b.py

64 experts of width 2,560, 8 per token, from 9 copies of the dense layer; configs/moe_57b_a14b.py trains the result on.
The vocabulary stays the dense model's, 152,064 rows; the released 57B-A14B has 151,936.
"""

from pathlib import Path

from qwen2_jax.train import Upcycle, Upcycling

config = Upcycle(
    checkpoint="qwen2-7b",
    experts=Upcycling(
        num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560, shared_expert_intermediate_size=20480
    ),
    out=Path("runs/upcycle-57b-a14b"),
)
