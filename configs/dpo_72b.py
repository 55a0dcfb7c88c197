# SPDX-License-Identifier: Apache-2.0
"""DPO of a Qwen2-72B that was tuned for chat, on 128 chips of a TPU v5p.

    python train.py configs/dpo_72b.py --data.sources pairs.jsonl

--plan v5p-256: 21.6 GiB per device, 6.35 to 7.81 s a step, MFU 51% to 63%; of the memory 1.1 GiB are the reference.

The numbers are those of dpo_7b.py. The reference stays on the devices: several hosts train together, and each has part
of the rows only. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Dpo, Logging, Mesh, Optim, Preference, Start

config = Dpo(
    start=Start(checkpoint="qwen2-72b-instruct"),
    data=Data(sources=(Source(path="pairs.jsonl"),), packing="best_fit"),
    preference=Preference(beta=0.1),
    reference="live",
    rows=128,
    length=4096,
    optim=Optim(lr=5e-7, schedule="cosine", warmup=100, final=0.0, decay=0.0, b2=0.999),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(tensorboard=True),
    out=Path("runs/dpo-72b"),
)
