# SPDX-License-Identifier: Apache-2.0
"""Qwen2-72B from random weights at 4,096 tokens, on a TPU v5p-256 (128 chips), or eight nodes of eight H100.

    python train.py configs/pretrain_72b.py --data.sources gs-mount/corpus/

--plan v5p-256: 41.4 GiB per device, 50.8 to 57.2 s a step, MFU 56% to 63%.
--plan 8x8xh100: 52.6 GiB per device, 58.0 to 65.1 s a step, MFU 45% to 51%.

What is not given here is as in pretrain_7b.py: 4,194,304 tokens a step. The optimizer's numbers are stand-ins (see
pretrain_0p5b.py). Not run at this size by us.
"""

import dataclasses
from pathlib import Path

from qwen2_jax import PRESETS
from qwen2_jax.train import Checkpointing, Optim, config_file

config = dataclasses.replace(
    config_file.load(Path(__file__).with_name("pretrain_7b.py")),
    model=dataclasses.replace(PRESETS["qwen2-72b"], rope_theta=10_000.0, max_position_embeddings=4096),
    tokenizer="qwen2-72b",
    accumulate=4,
    steps=500_000,
    optim=Optim(lr=1.5e-4, warmup=2000),
    checkpoints=Checkpointing(every_steps=500, keep_last=3, keep_every=10_000),
    out=Path("runs/pretrain-72b"),
)
