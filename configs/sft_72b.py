# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of Qwen2-72B with the report's numbers (arXiv:2407.10671, sec. 4.2), on 256 chips of v5p.

    python train.py configs/sft_72b.py --data.sources chats.jsonl

--plan v5p-512: 78.8 GiB per device, 65.7 to 68.1 s a step, MFU 58% to 61%.

As configs/sft_7b.py, with four times as many rows, which is AutoIF's proportion. Not run at this size by us.
"""

import dataclasses
from pathlib import Path

from qwen2_jax.train import Checkpointing, Start, config_file

config = dataclasses.replace(
    config_file.load(Path(__file__).with_name("sft_7b.py")),
    start=Start(checkpoint="qwen2-72b"),
    rows=256,
    accumulate=1,
    checkpoints=Checkpointing(every_steps=100),
    out=Path("runs/sft-72b"),
)
