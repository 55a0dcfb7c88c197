# SPDX-License-Identifier: Apache-2.0
"""Qwen2-7B from random weights at 4,096 tokens, on 64 chips or more of a TPU v5e, or eight H100.

    python train.py configs/pretrain_7b.py --data.sources gs-mount/corpus/

--plan 8xh100: 44.6 GiB per device, 46.5 to 50.3 s a step, MFU 47% to 51%.
--plan v5e-64: 10.0 GiB per device, 22.4 to 29.4 s a step, MFU 51% to 67%.

4,194,304 tokens a step. The optimizer's numbers are stand-ins (see pretrain_0p5b.py). Not run at this size by us.
"""

import dataclasses
from pathlib import Path

from qwen2_jax import PRESETS
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Guard, Logging, Mesh, Optim, Pretrain

config = Pretrain(
    model=dataclasses.replace(PRESETS["qwen2-7b"], rope_theta=10_000.0, max_position_embeddings=4096),
    tokenizer="qwen2-7b",
    data=Data(sources=(Source(path="corpus"),)),
    rows=1024,
    accumulate=8,
    length=4096,
    steps=250_000,
    optim=Optim(lr=3e-4, warmup=2000),
    z_loss=1e-4,
    guard=Guard(spike=8.0),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=1000, keep_last=3, keep_every=10_000),
    log=Logging(tensorboard=True),
    out=Path("runs/pretrain-7b"),
)
