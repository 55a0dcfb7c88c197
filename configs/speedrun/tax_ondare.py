# SPDX-License-Identifier: Apache-2.0
"""Speedrun: DPO as in tax_adamw.py, its updates merged with what prose.py had learned (OnDARE).

python train.py configs/speedrun/prose.py
python train.py configs/speedrun/tax_ondare.py
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Dpo, Evaluation, Logging, OnlineMerging, Optim, Start

DATA = "runs/speedrun/tasks"

config = Dpo(
    start=Start(checkpoint="runs/speedrun/prose/hf"),
    data=Data(sources=(Source(path=f"{DATA}/pairs.jsonl"),), packing="best_fit"),
    rows=16,
    length=148,  # two pairs
    steps=200,
    optim=Optim(
        lr=3e-4,
        schedule="linear",
        warmup=5,
        final=0.1,
        decay=0.0,
        b2=0.99,
        # alpha is larger than the paper's, for 200 steps are few; survivors are scaled up as in its authors' program.
        merging=OnlineMerging(base="demo", variant="code", keep=0.1, alpha=1e-3),
    ),
    dtype="float32",
    remat=None,
    export_dtype="float32",
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/pairs.jsonl"),), every=20, first=True, batches=7),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(every=5),
    out=Path("runs/speedrun/tax_ondare"),
)
