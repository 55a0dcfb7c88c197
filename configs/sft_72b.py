# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of Qwen2-72B with the report's numbers (arXiv:2407.10671, sec. 4.2), on 256 chips of v5p.

    python train.py configs/sft_72b.py --data.sources chats.jsonl

--plan v5p-512: 78.8 GiB per device, 65.7 to 68.1 s a step, MFU 58% to 61%.

As configs/sft_7b.py, with four times as many rows, which is AutoIF's proportion. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Logging, Mesh, Sft, Start

config = Sft(
    start=Start(checkpoint="qwen2-72b"),
    data=Data(sources=(Source(path="chats.jsonl"),), packing="best_fit", too_long="drop"),
    rows=256,
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(tensorboard=True),
    out=Path("runs/sft-72b"),
)
