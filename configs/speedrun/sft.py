# SPDX-License-Identifier: Apache-2.0
"""Speedrun, stage 5: fine-tuning on chats, answers only.

    python train.py configs/speedrun/sft.py

Whole conversations are packed into rows of 1,024 tokens; of the text of a recall question nothing is a target.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Muon, Optim, Sft, Start

DATA = "runs/speedrun/data"

config = Sft(
    start=Start(checkpoint="runs/speedrun/moe/hf"),
    data=Data(
        sources=(
            Source(path=f"{DATA}/chats.jsonl", weight=0.7),
            Source(path=f"{DATA}/recall.jsonl", weight=0.3, max_tokens=1024),
        ),
        packing="best_fit",
    ),
    rows=4,
    length=1024,
    steps=400,
    optim=Optim(lr=1e-3, schedule="linear", warmup=20, final=0.05, decay=0.05, muon=Muon(lr=0.005)),
    dtype="float32",
    remat=None,
    evaluation=Evaluation(
        sources=tuple(
            Source(path=f"{DATA}/held_out/{kind}.jsonl") for kind in ("code", "prose", "sums", "copy", "recall")
        ),
        every=100,
        first=True,
    ),
    checkpoints=Checkpointing(every_steps=100),
    out=Path("runs/speedrun/sft"),
)
