# SPDX-License-Identifier: Apache-2.0
"""Speedrun: GRPO, from the bundled demo model. It adds in words that it was never asked in, and is told what is right.

python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks
python train.py configs/speedrun/grpo.py
"""

from pathlib import Path

from qwen2_jax.data.spec import PromptData, Source
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train import Checkpointing, Evaluation, Logging, Optim, Start
from qwen2_jax.train.post_training_config import Grpo, Sampling

DATA = "runs/speedrun/tasks"

config = Grpo(
    start=Start(checkpoint="demo"),
    data=PromptData(sources=(f"{DATA}/sums.jsonl",), max_tokens=32),
    rewards=(RewardFunction(function="number"),),
    prompts=32,
    sampling=Sampling(samples=8, max_new_tokens=5, temperature=1.2, rows=256),
    rows=52,
    length=180,  # five answers
    steps=160,
    optim=Optim(lr=2e-4, schedule="wsd", fall=0.5, warmup=5, final=0.1, decay=0.0, b2=0.99),
    bound=1e-4,
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/sums.jsonl"),), every=20, first=True, batches=7),
    checkpoints=Checkpointing(every_steps=80),
    log=Logging(every=5),
    out=Path("runs/speedrun/grpo"),
)
