# SPDX-License-Identifier: Apache-2.0
"""Speedrun, stage 1: a dense Qwen2 of 2.3 M parameters from random weights, on rows of 256 tokens.

    python -m qwen2_jax.speedrun.corpus runs/speedrun/data
    python train.py configs/speedrun/pretrain.py

Chats are mixed into pre-training, as the Qwen2 report does with instruction data (arXiv:2407.10671, sec. 3.1).
"""

from pathlib import Path

from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Evaluation, Muon, Optim, Pretrain

DATA = "runs/speedrun/data"

config = Pretrain(
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
    ),
    tokenizer=f"{DATA}/tokenizer",
    data=Data(
        sources=(
            Source(path=f"{DATA}/text/prose.jsonl", weight=0.13),
            Source(path=f"{DATA}/text/code.jsonl", weight=0.05),
            Source(path=f"{DATA}/text/stories.jsonl", weight=0.02),
            Source(path=f"{DATA}/sums.jsonl", weight=0.25),
            Source(path=f"{DATA}/chats.jsonl", weight=0.40),
            Source(path=f"{DATA}/recall.jsonl", weight=0.15, max_tokens=256),
        ),
    ),
    rows=16,
    length=256,
    steps=1600,
    optim=Optim(lr=3e-3, schedule="wsd", warmup=50, fall=0.2, final=0.1, decay=0.05, muon=Muon(lr=0.02)),
    dtype="float32",
    remat=None,
    evaluation=Evaluation(
        sources=tuple(Source(path=f"{DATA}/held_out/{kind}.jsonl") for kind in ("prose", "sums", "copy")), every=200
    ),
    checkpoints=Checkpointing(every_steps=200),
    out=Path("runs/speedrun/pretrain"),
)
