# SPDX-License-Identifier: Apache-2.0
"""A short run that benchmarks/kill_test.py kills again and again: small steps, a checkpoint every ten of them.

    python -m qwen2_jax.speedrun.corpus runs/speedrun/data
    python benchmarks/kill_test.py --work runs/kill      # runs `python train.py configs/speedrun/kill.py --out ...`

Every step is a line of metrics with a digest of its batch. The sources are a weighted mixture in which some rows come
round again, so the test also covers the order after the first epoch.
"""

from pathlib import Path

from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.observe import Logging
from qwen2_jax.train import Checkpointing, Evaluation, Muon, Optim, Pretrain

DATA = "runs/speedrun/data"

config = Pretrain(
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
    tokenizer=f"{DATA}/tokenizer",
    data=Data(
        sources=(
            Source(path=f"{DATA}/held_out/prose.jsonl", weight=0.3),
            Source(path=f"{DATA}/held_out/sums.jsonl", weight=0.5),  # some 40 rows: five epochs of them
            Source(path=f"{DATA}/text/code.jsonl", weight=0.2),
        ),
    ),
    rows=4,
    length=128,
    steps=600,
    optim=Optim(lr=1e-3, schedule="wsd", warmup=20, muon=Muon(lr=0.005)),
    dtype="float32",
    remat=None,
    ema=0.99,
    evaluation=Evaluation(sources=(Source(path=f"{DATA}/held_out/copy.jsonl"),), every=100),
    checkpoints=Checkpointing(every_steps=10, keep_last=3),
    log=Logging(every=1, batch_digest=True),
    out=Path("runs/kill/run"),
)
