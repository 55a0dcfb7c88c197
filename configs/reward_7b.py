# SPDX-License-Identifier: Apache-2.0
"""A reward model from a Qwen2-7B that was tuned for chat, on eight H100.

    python train.py configs/reward_7b.py --data.sources ranked.jsonl

--plan 8xh100: 19.8 GiB per device, 5.9 to 7.1 s a step, MFU 41% to 50%.

Six responses to a prompt, all pairs of them, one epoch, and the head of two layers are Qwen2.5-Math's
(arXiv:2409.12122, sec. 3.2 and eq. 1); it gives no learning rate: 1e-5 is usual where all weights are trained. A row
holds a prompt six times, each with a response. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Logging, Mesh, Optim, Reward, Start

config = Reward(
    start=Start(checkpoint="qwen2-7b-instruct"),
    data=Data(sources=(Source(path="ranked.jsonl"),), packing="best_fit"),
    rows=64,
    accumulate=8,  # a row per GPU at a time
    length=8192,
    optim=Optim(lr=1e-5, schedule="cosine", warmup=100, final=0.1, decay=0.1),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=200),
    log=Logging(tensorboard=True),
    out=Path("runs/reward-7b"),
)
