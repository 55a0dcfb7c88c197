# SPDX-License-Identifier: Apache-2.0
"""Trains the upcycled 57B-A14B on, at 4,096 tokens, on a TPU v5p-256 (128 chips).

    python train.py configs/moe_57b_a14b.py --data.sources gs-mount/corpus/

--plan v5p-256: 24.7 GiB per device, 9.55 to 12.4 s a step, MFU 49% to 63% (docs/scaling.md: other meshes are slower).
--plan v5p-128: 49.0 GiB per device, 19.1 to 23.7 s a step, MFU 51% to 63%.
--plan 8x8xh100 --mesh.expert 8 --accumulate 8: 24.9 GiB per device, 11.0 to 19.7 s a step, MFU 28% to 51%.

4,194,304 tokens a step; the report continues with 4.5 T tokens (arXiv:2407.10671, sec. 3.1): about a million of these
steps. The optimizer's numbers are stand-ins (see pretrain_0p5b.py). Not run at this size by us.
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
