# SPDX-License-Identifier: Apache-2.0
"""Speedrun: what the alignment tax is measured on. The demo, which chatted last, is trained on its prose again.

    python -m qwen2_jax.speedrun.post_training_data runs/speedrun/tasks
    python train.py configs/speedrun/prose.py

tax_adamw.py and tax_ondare.py start from the result: the difference from the demo is what online merging holds on to.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Logging, Optim, Pretrain, Start

DATA = "runs/speedrun/tasks"

config = Pretrain(
    start=Start(checkpoint="demo"),
    data=Data(sources=(Source(path=f"{DATA}/prose.jsonl"),)),
    rows=8,
    length=256,
    steps=60,
    optim=Optim(lr=3e-4, schedule="linear", warmup=5, final=0.1, decay=0.0, b2=0.99),
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/prose.jsonl"),), every=20, first=True),
    checkpoints=Checkpointing(every_steps=60),
    log=Logging(every=5),
    out=Path("runs/speedrun/prose"),
)
