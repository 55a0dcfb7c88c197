# SPDX-License-Identifier: Apache-2.0
"""DPO of a Qwen2-72B that was tuned for chat, on 128 chips of a TPU v5p.

    python train.py configs/dpo_72b.py --data.sources pairs.jsonl

--plan v5p-256: 21.6 GiB per device, 6.35 to 7.81 s a step, MFU 51% to 63%; of the memory 1.1 GiB are the reference.

What is not given here is as in dpo_7b.py. The reference stays on the devices: several hosts train together, and each
has part of the rows only. Not run at this size by us.
"""

import dataclasses
from pathlib import Path

from qwen2_jax.train import Checkpointing, Start, config_file

config = dataclasses.replace(
    config_file.load(Path(__file__).with_name("dpo_7b.py")),
    start=Start(checkpoint="qwen2-72b-instruct"),
    reference="live",
    rows=128,
    accumulate=1,
    checkpoints=Checkpointing(every_steps=100),
    out=Path("runs/dpo-72b"),
)
