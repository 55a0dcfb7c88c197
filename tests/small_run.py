# SPDX-License-Identifier: Apache-2.0
"""A training run that takes seconds, for tests that start train.py as its users do."""

import json

from qwen2_jax.speedrun import bpe


def write_corpus(folder):
    """A tokenizer, texts and chats."""
    lines = [f"The number after {i} is {i + 1}, and the one before it is {i - 1}." for i in range(60)]
    bpe.save(bpe.train(lines, vocab_size=300), folder / "tokenizer", max_length=64)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines), "utf-8")
    chats = [
        {"messages": [{"role": "user", "content": f"after {i}"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(12)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), "utf-8")


def config_file(corpus, folder, changes):
    """A config of a very small run as a file, for a process of its own. changes: fields, as Python."""
    file = folder / "config.py"
    file.write_text(
        f'''"""python train.py"""
from pathlib import Path
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.observe import Logging
from qwen2_jax.train import Checkpointing, Optim, Pretrain
config = Pretrain(
    model=ModelConfig(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64), tokenizer={str(corpus / "tokenizer")!r},
    data=Data(sources=(Source(path={str(corpus / "text.jsonl")!r}),)), rows=4, length=32,
    optim=Optim(lr=1e-2, schedule="constant"), dtype="float32", remat=None, log=Logging(every=1, batch_digest=True),
    out=Path({str(folder / "out")!r}), {changes})
''',
        "utf-8",
    )
    return file
