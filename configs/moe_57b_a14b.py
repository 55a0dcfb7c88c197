# SPDX-License-Identifier: Apache-2.0
"""Trains the upcycled 57B-A14B on, at 4,096 tokens, on 128 chips of a TPU v5p.

    python train.py configs/moe_57b_a14b.py --data.sources gs-mount/corpus/

As compiled, --plan v5p-256: 24.8 GiB per device, 9.55 to 12.4 s a step (docs/scaling.md: other meshes are slower).
The report continues with 4.5 T tokens (arXiv:2407.10671, sec. 3.1): about a million of these steps. The optimizer's
numbers are stand-ins (see pretrain_0p5b.py). Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Checkpointing, Guard, Logging, Mesh, Moe, Optim, Pretrain, Start

config = Pretrain(
    start=Start(checkpoint="runs/upcycle-57b-a14b/hf"),
    data=Data(sources=(Source(path="corpus"),)),
    rows=1024,
    accumulate=4,
    length=4096,
    steps=1_000_000,
    optim=Optim(lr=1e-4, warmup=2000),
    z_loss=1e-4,
    moe=Moe(load_balancing=0.001, router_z=1e-3),
    guard=Guard(spike=8.0),
    mesh=Mesh(fsdp=-1, expert=16),  # 4 experts each; on 4x4x8 chips, tokens cross two rings of 4
    checkpoints=Checkpointing(every_steps=500, keep_last=3, keep_every=10_000),
    log=Logging(tensorboard=True),
    out=Path("runs/moe-57b-a14b"),
)
