# SPDX-License-Identifier: Apache-2.0
"""Qwen2-7B's last phase of pre-training: 4,096 to 32,768 tokens, rotary base 1e4 to 1e6 (arXiv:2407.10671, sec. 3.2),
on eight H100.

    python train.py configs/long_32k_7b.py

--plan 8xh100: 32.1 GiB per device, 67.4 to 72.1 s a step, MFU 46% to 49%.

The report gives no token count and no mix; 40% long rows and 60% shorter ones are Qwen2.5-Turbo's. 4,194,304 tokens a
step. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Guard, Logging, Mesh, Optim, Pretrain, Start

config = Pretrain(
    start=Start(checkpoint="runs/pretrain-7b/hf", rope_theta=1e6, max_position_embeddings=32768),
    data=Data(
        sources=(
            Source(path="corpus", weight=0.4, min_tokens=16384),
            Source(path="corpus", weight=0.6, max_tokens=16383),
        )
    ),
    rows=128,
    accumulate=16,  # a row per GPU at a time
    length=32768,
    steps=5000,
    optim=Optim(lr=3e-5, schedule="linear", warmup=100),
    z_loss=1e-4,
    guard=Guard(spike=8.0),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=250, keep_last=3),
    log=Logging(tensorboard=True),
    out=Path("runs/long-32k-7b"),
)
