# SPDX-License-Identifier: Apache-2.0
"""Speedrun: a reward model from the bundled demo model, which learns how near an answer is to the right sum.

python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks
python train.py configs/speedrun/reward.py
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Logging, Optim, Reward, Start

DATA = "runs/speedrun/tasks"

config = Reward(
    start=Start(checkpoint="demo"),
    data=Data(sources=(Source(path=f"{DATA}/ranked.jsonl"),), packing="best_fit"),
    rows=16,
    length=160,  # four answers
    steps=200,
    optim=Optim(lr=5e-4, schedule="linear", warmup=10, final=0.1, decay=0.0, b2=0.99),
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(
        sources=tuple(Source(path=f"{DATA}/held_out/{kind}.jsonl") for kind in ("pairs", "ranked")),
        every=40,
        first=True,
        batches=13,
    ),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(every=5),
    out=Path("runs/speedrun/reward"),
)
