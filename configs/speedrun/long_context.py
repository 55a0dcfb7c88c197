# SPDX-License-Identifier: Apache-2.0
"""Speedrun, stage 2: the context grows from 256 to 1024 tokens, and the rotary base from 1e4 to 1e6.

    python train.py configs/speedrun/long_context.py

The proportions of the Qwen2 report's last phase of pre-training (4,096 to 32,768, same bases; arXiv:2407.10671, sec.
3.2). 40% of the rows are documents longer than the old context, 60% are shorter ones, the mix that Qwen2.5-Turbo gives.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Muon, Optim, Pretrain, Start

DATA = "runs/speedrun/data"

config = Pretrain(
    start=Start(checkpoint="runs/speedrun/pretrain/hf", rope_theta=1e6, max_position_embeddings=1024),
    data=Data(
        sources=(
            Source(path=f"{DATA}/recall.jsonl", weight=0.3, min_tokens=257, max_tokens=1024),
            Source(path=f"{DATA}/text/prose.jsonl", weight=0.1, min_tokens=257),
            Source(path=f"{DATA}/recall.jsonl", weight=0.1, max_tokens=256),
            Source(path=f"{DATA}/text/prose.jsonl", weight=0.1, max_tokens=256),
            Source(path=f"{DATA}/sums.jsonl", weight=0.1),
            Source(path=f"{DATA}/chats.jsonl", weight=0.3),
        ),
        packing="best_fit",
        too_long="cut",
    ),
    rows=4,
    length=1024,
    steps=300,
    optim=Optim(lr=1e-3, schedule="linear", warmup=20, final=0.1, decay=0.05, muon=Muon(lr=0.005)),
    dtype="float32",
    remat=None,
    evaluation=Evaluation(
        sources=tuple(Source(path=f"{DATA}/held_out/{kind}.jsonl") for kind in ("prose", "sums", "copy", "recall")),
        every=100,
        first=True,
    ),
    checkpoints=Checkpointing(every_steps=100),
    out=Path("runs/speedrun/long_context"),
)
