# SPDX-License-Identifier: Apache-2.0
"""Training: run configurations that `python train.py` reads, losses, optimizers, the step and the loop."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from qwen2_jax.model.lora import Lora
    from qwen2_jax.observe.config import Logging
    from qwen2_jax.train.config import Evaluation, Guard, Mesh, Moe, Muon, Optim, Pretrain, Sft, Start, Upcycle
    from qwen2_jax.train.objectives.dpo import Preference
    from qwen2_jax.train.objectives.grpo import Policy
    from qwen2_jax.train.optim.online_merging import OnlineMerging
    from qwen2_jax.train.post_training_config import Dpo, Grpo, OnlineDpo, Reward, RewardModel, Sampling
    from qwen2_jax.train.state.checkpoints import Checkpointing
    from qwen2_jax.train.upcycle.upcycle import Upcycling

__all__ = [
    "Checkpointing", "Dpo", "Evaluation", "Grpo", "Guard", "Logging", "Lora", "Mesh", "Moe", "Muon", "OnlineDpo",
    "OnlineMerging", "Optim", "Policy", "Preference", "Pretrain", "Reward", "RewardModel", "Sampling", "Sft",
    "Start", "Upcycle", "Upcycling",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.model.lora": ["Lora"],
        "qwen2_jax.observe.config": ["Logging"],
        "qwen2_jax.train.config": [
            "Evaluation",
            "Guard",
            "Mesh",
            "Moe",
            "Muon",
            "Optim",
            "Pretrain",
            "Sft",
            "Start",
            "Upcycle",
        ],
        "qwen2_jax.train.post_training_config": ["Dpo", "Grpo", "OnlineDpo", "Reward", "RewardModel", "Sampling"],
        "qwen2_jax.train.objectives.dpo": ["Preference"],
        "qwen2_jax.train.objectives.grpo": ["Policy"],
        "qwen2_jax.train.optim.online_merging": ["OnlineMerging"],
        "qwen2_jax.train.state.checkpoints": ["Checkpointing"],
        "qwen2_jax.train.upcycle.upcycle": ["Upcycling"],
    },
)
