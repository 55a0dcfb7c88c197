# SPDX-License-Identifier: Apache-2.0
"""Pre-training from nothing: data, loop, and the result as a Hugging Face folder."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from tokenizers import Tokenizer

from qwen2_jax import checkpoint
from qwen2_jax.data import bpe, text
from qwen2_jax.data.mixture import DemoMixture, tokenizer_texts
from qwen2_jax.data.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.params import Tree
from qwen2_jax.train import curve, loop
from qwen2_jax.train.config import Pretrain


def run(config: Pretrain, console: Console | None = None) -> Path:
    """Runs a configuration to its end and returns the folder with the result, config.out / "hf"."""
    console = console or Console(stderr=True)
    documents = text.stdlib_documents()
    tokenizer = demo_tokenizer(config, documents)
    source = DemoMixture(tokenizer, documents)
    console.print(f"{len(documents)} documents, {source.prose.size:,} tokens of prose, {source.code.size:,} of code")

    def batch(step: int) -> Batch:
        stage = config.stage(step)
        shares = dataclasses.asdict(stage.shares)
        return source.batch(config.seed, step, rows=stage.rows, length=stage.length, shares=shares)

    longest = max(stage.length for stage in config.data.stages)
    held_out = source.held_out(config.seed, rows=config.evaluation.rows, length=longest)
    state = loop.run(config, batch, held_out, console=console)
    folder = config.out / "hf"
    export(config, state.params, tokenizer, folder)
    try:
        curve.draw(config.out / "metrics.jsonl", config.out / "loss.png")
    except UserError as missing:  # a curve is worth having, not worth losing the run for
        console.print(f"no loss curve: {missing}")
    console.print(f"wrote {folder}")
    return folder


def demo_tokenizer(config: Pretrain, documents) -> Tokenizer:
    """The run's tokenizer: the one in its folder, else learned from the training documents. Raises on a wrong size."""
    path = config.out / "tokenizer" / "tokenizer.json"
    if config.resume and path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        train = text.split(documents, held_out=False)
        tokenizer = bpe.train(tokenizer_texts(train), vocab_size=config.data.vocabulary)
        bpe.save(tokenizer, path.parent, max_length=config.model.max_position_embeddings)
    if (size := bpe.padded_size(tokenizer)) != config.model.vocab_size:
        raise UserError(f"model.vocab_size is {config.model.vocab_size}; this tokenizer needs {size}")
    return tokenizer


def export(config: Pretrain, params: Tree, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes bfloat16 weights, config and tokenizer files in Hugging Face's format, replacing an earlier result."""
    published = dataclasses.replace(
        config.model,
        dtype="bfloat16",
        bos_token_id=tokenizer.token_to_id(bpe.END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(bpe.IM_END),
    )
    if folder.exists():
        shutil.rmtree(folder)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    checkpoint.save_hf(folder, published, params)
    bpe.save(tokenizer, folder, max_length=config.model.max_position_embeddings)
