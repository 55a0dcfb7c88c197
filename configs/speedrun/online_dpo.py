# SPDX-License-Identifier: Apache-2.0
"""Speedrun: online DPO, from the bundled demo model. Of its answers to a sum a right and a wrong one become a pair.

    python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks
    python train.py configs/speedrun/online_dpo.py

The Qwen2 report lets a reward model choose; for sums a function knows better.
"""

from pathlib import Path

from qwen2_jax.data.spec import PromptData, Source
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train import Checkpointing, Evaluation, Logging, OnlineDpo, Optim, Sampling, Start

DATA = "runs/speedrun/tasks"

config = OnlineDpo(
    start=Start(checkpoint="demo"),
    data=PromptData(sources=(f"{DATA}/sums.jsonl",), max_tokens=32),
    rewards=(RewardFunction(function="number"),),
    prompts=32,
    sampling=Sampling(samples=8, max_new_tokens=5, temperature=1.2, rows=256),
    rows=16,
    length=148,  # two pairs
    steps=120,
    optim=Optim(lr=2e-4, schedule="linear", warmup=5, final=0.1, decay=0.0, b2=0.99),
    bound=1e-4,
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/sums.jsonl"),), every=20, first=True, batches=7),
    checkpoints=Checkpointing(every_steps=40),
    log=Logging(every=5),
    out=Path("runs/speedrun/online_dpo"),
)
