# SPDX-License-Identifier: Apache-2.0
"""Training: losses, optimizers, the loop, and the run configurations that `python train.py` reads."""

from qwen2_jax.lora import Lora
from qwen2_jax.observe import Logging
from qwen2_jax.train.checkpoints import Checkpointing
from qwen2_jax.train.config import Evaluation, Guard, Mesh, Moe, Muon, Optim, Pretrain, Sft, Start, Upcycle
from qwen2_jax.train.merging import OnlineMerging
from qwen2_jax.train.policy import Policy
from qwen2_jax.train.post_training import Dpo, Grpo, OnlineDpo, Reward, RewardModel, Sampling
from qwen2_jax.train.preference import Preference
from qwen2_jax.train.upcycle import Upcycling

__all__ = [
    "Checkpointing",
    "Dpo",
    "Evaluation",
    "Grpo",
    "Guard",
    "Logging",
    "Lora",
    "Mesh",
    "Moe",
    "Muon",
    "OnlineDpo",
    "OnlineMerging",
    "Optim",
    "Policy",
    "Preference",
    "Pretrain",
    "Reward",
    "RewardModel",
    "Sampling",
    "Sft",
    "Start",
    "Upcycle",
    "Upcycling",
]
