# SPDX-License-Identifier: Apache-2.0
"""Speedrun, stage 4: the upcycled mixture of experts trains on.

    python train.py configs/speedrun/moe.py

For comparison the dense model trains on the same tokens; only start and folder differ:

    python train.py configs/speedrun/moe.py --start.checkpoint runs/speedrun/long_context/hf --out runs/speedrun/dense
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Muon, Optim, Pretrain, Start

DATA = "runs/speedrun/data"

config = Pretrain(
    start=Start(checkpoint="runs/speedrun/upcycle/hf"),
    data=Data(
        sources=(
            Source(path=f"{DATA}/text/prose.jsonl", weight=0.1),
            Source(path=f"{DATA}/text/code.jsonl", weight=0.4),  # the only text that was not read before, or hardly
            Source(path=f"{DATA}/text/stories.jsonl", weight=0.05),
            Source(path=f"{DATA}/sums.jsonl", weight=0.1),
            Source(path=f"{DATA}/chats.jsonl", weight=0.2),
            Source(path=f"{DATA}/recall.jsonl", weight=0.15, max_tokens=512),
        ),
    ),
    rows=8,
    length=512,
    steps=400,
    optim=Optim(lr=2e-3, schedule="linear", warmup=20, final=0.1, decay=0.05, muon=Muon(lr=0.01)),
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
    out=Path("runs/speedrun/moe"),
)
