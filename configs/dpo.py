# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization of the bundled demo model, or any chat model, on pairs of answers.

    python train.py configs/dpo.py --data.sources pairs.jsonl
    python infer.py --ckpt runs/dpo/hf

One JSON object per line: {"prompt": "...", "chosen": "...", "rejected": "..."}; whole conversations, ShareGPT and
Alpaca rankings are recognised too (docs/training.md). The learning rate is the demo model's: a real model takes
--optim.lr 5e-7.
"""

from pathlib import Path

from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Dpo, Optim, Preference, Start

config = Dpo(
    start=Start(checkpoint="demo"),
    data=Data(sources=(Source(path="pairs.jsonl"),), packing="best_fit"),
    preference=Preference(loss="sigmoid", beta=0.1),
    rows=2,
    length=512,  # both answers of a pair, each with the prompt, lie in one row
    epochs=3,
    optim=Optim(lr=1e-5, schedule="cosine", decay=0.0, b2=0.999),
    dtype="float32",
    out=Path("runs/dpo"),
)
