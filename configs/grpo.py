# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled demo model, or any chat model, on its own answers to your prompts, judged by reward functions.

    python train.py configs/grpo.py --data.sources prompts.jsonl
    python train.py configs/grpo.py --data.sources prompts.jsonl --rewards rewards.py:brief number,weight=0.5
    python infer.py --ckpt runs/grpo/hf

One JSON object per line: {"prompt": "What is 2 + 3?", "answer": "5"}. A reward function gets `answer` and every other
field; `number` compares the last number of an answer with it (docs/post-training.md). On the demo model a step takes
seconds on a laptop's CPU. A real model takes smaller steps: --optim.lr 1e-6.
"""

from pathlib import Path

from qwen2_jax.data.spec import PromptData
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train import Grpo, Optim, Policy, Sampling, Start

config = Grpo(
    start=Start(checkpoint="demo"),
    data=PromptData(sources=("prompts.jsonl",), max_tokens=128),
    rewards=(RewardFunction(function="number"),),
    prompts=8,  # of a step
    sampling=Sampling(samples=8, max_new_tokens=32),  # eight answers to each, which are compared with each other
    policy=Policy(kl=0.0),  # above 0: stay near the model that the run starts from, such as 0.001
    steps=20,
    optim=Optim(lr=1e-4, schedule="constant", decay=0.0, b2=0.999),
    dtype="float32",
    out=Path("runs/grpo"),
)
