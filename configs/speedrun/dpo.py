# SPDX-License-Identifier: Apache-2.0
"""Speedrun: DPO, from the bundled demo model, on pairs of the right sum and one near it.

python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks
python train.py configs/speedrun/dpo.py
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Dpo, Evaluation, Logging, Optim, Start

DATA = "runs/speedrun/tasks"

config = Dpo(
    start=Start(checkpoint="demo"),
    data=Data(sources=(Source(path=f"{DATA}/pairs.jsonl"),), packing="best_fit"),
    rows=16,
    length=148,  # two pairs
    steps=200,
    optim=Optim(lr=3e-4, schedule="linear", warmup=5, final=0.1, decay=0.0, b2=0.99),
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/pairs.jsonl"),), every=20, first=True, batches=7),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(every=5),
    out=Path("runs/speedrun/dpo"),
)
