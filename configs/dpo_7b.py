# SPDX-License-Identifier: Apache-2.0
"""DPO of a Qwen2-7B that was tuned for chat, on eight H100.

    python train.py configs/dpo_7b.py --data.sources pairs.jsonl

--plan 8xh100: 21.9 GiB per device, 2.91 to 3.54 s a step, MFU 42% to 51%.

The Qwen2 report (arXiv:2407.10671, sec. 4.3) gives no numbers. beta 0.1, batches of 128 pairs, 100 steps of warm-up,
a cosine and 2 epochs are the Online Merging paper's (arXiv:2405.17931), as are 2,048 tokens; of its learning rates 5e-7
is in the middle. Pairs are packed: 64 rows hold about 128 of them. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Dpo, Logging, Mesh, Optim, Preference, Start

config = Dpo(
    start=Start(checkpoint="qwen2-7b-instruct"),
    data=Data(sources=(Source(path="pairs.jsonl"),), packing="best_fit"),
    preference=Preference(beta=0.1),
    rows=64,
    accumulate=4,  # two rows per GPU at a time
    length=4096,
    optim=Optim(lr=5e-7, schedule="cosine", warmup=100, final=0.0, decay=0.0, b2=0.999),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=200),
    log=Logging(tensorboard=True),
    out=Path("runs/dpo-7b"),
)
