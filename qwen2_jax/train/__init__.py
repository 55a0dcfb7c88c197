# SPDX-License-Identifier: Apache-2.0
"""Training: losses, optimizers, the loop, and the run configurations that `python train.py` reads."""

from qwen2_jax.train.config import DemoData, Evaluation, Muon, Optim, Pretrain, Shares, Stage

__all__ = ["DemoData", "Evaluation", "Muon", "Optim", "Pretrain", "Shares", "Stage"]
