# SPDX-License-Identifier: Apache-2.0
"""Qwen2-0.5B from random weights at 4,096 tokens, on one GPU of 80 GB.

    python train.py configs/pretrain_0p5b.py --data.sources corpus/

--plan h100: 12.9 GiB per device, 1.93 to 2.26 s a step, MFU 41% to 48%.

The report publishes neither learning rate nor batch (arXiv:2407.10671, sec. 3.1); the optimizer's numbers are the usual
stand-in, Qwen-1's AdamW with a cosine to 10%. 262,144 tokens a step. Not run at this size by us.
"""

import dataclasses
from pathlib import Path

from qwen2_jax import PRESETS
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Guard, Logging, Optim, Pretrain

config = Pretrain(
    model=dataclasses.replace(PRESETS["qwen2-0.5b"], rope_theta=10_000.0, max_position_embeddings=4096),
    tokenizer="qwen2-0.5b",
    data=Data(sources=(Source(path="corpus"),)),
    rows=64,
    accumulate=8,
    length=4096,
    steps=100_000,
    optim=Optim(lr=1e-3, warmup=2000),
    z_loss=1e-4,
    guard=Guard(spike=8.0),
    checkpoints=Checkpointing(every_steps=1000, keep_last=3, keep_every=10_000),
    log=Logging(tensorboard=True),
    out=Path("runs/pretrain-0.5b"),
)
