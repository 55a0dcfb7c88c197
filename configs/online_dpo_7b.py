# SPDX-License-Identifier: Apache-2.0
"""The Qwen2 report's online stage for a 7B, on eight H100: DPO on the best and the worst of the model's own answers.

    python train.py configs/online_dpo_7b.py --data.sources prompts.jsonl

--plan 8xh100: 49.9 GiB per device, 5.8 to 8.0 s a step, MFU 37% to 51%; and 9 to 12 s for an episode's answers if all
were as long as they may be. The reward model, another 1.8 GiB, is not counted.

The procedure and the Online Merging Optimizer are the report's (arXiv:2407.10671, sec. 4.3), which gives no numbers.
alpha 1e-7 and keep 0.01 are the paper's script (arXiv:2405.17931), with its optimizer as it was run ("code"); learning
rate, beta and batch are those of dpo_7b.py; temperature 0.8 is AutoIF's (arXiv:2406.13542). The reward model is what
reward_7b.py makes. Not run at this size by us.
"""

from pathlib import Path

from qwen2_jax.data.spec import PromptData
from qwen2_jax.train import (
    Checkpointing,
    Logging,
    Mesh,
    OnlineDpo,
    OnlineMerging,
    Optim,
    Preference,
    RewardModel,
    Sampling,
    Start,
)  # fmt: skip

config = OnlineDpo(
    start=Start(checkpoint="qwen2-7b-instruct"),
    data=PromptData(sources=("prompts.jsonl",), max_tokens=1024),
    reward_model=RewardModel(checkpoint="runs/reward-7b/hf"),
    prompts=128,
    # To sample, each GPU has all weights; 8 x 128 answers at a time.
    sampling=Sampling(samples=8, max_new_tokens=1024, temperature=0.8, rows=1024, mesh=Mesh(data=8, fsdp=1)),
    preference=Preference(beta=0.1),
    accumulate=16,  # a row per GPU at a time
    steps=1000,
    optim=Optim(
        lr=5e-7,
        schedule="constant",
        warmup=10,
        decay=0.0,
        b2=0.999,
        merging=OnlineMerging(base="qwen2-7b", variant="code", keep=0.01, alpha=1e-7),
    ),
    mesh=Mesh(fsdp=-1),
    checkpoints=Checkpointing(every_steps=100),
    log=Logging(tensorboard=True),
    out=Path("runs/online-dpo-7b"),
)
