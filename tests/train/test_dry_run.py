# SPDX-License-Identifier: Apache-2.0
"""What --dry-run prints: sizes that add up, and a first row in which the mask can be seen."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from qwen2_jax import PRESETS, checkpoint, model
from qwen2_jax.data.tokens import packing_plan
from qwen2_jax.data.tokens.packing import pack_groups, pack_row, stack
from qwen2_jax.model import flops
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.train import dry_run
from tiny import CONFIGS


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(checkpoint.locate("demo").path)


class Document(SimpleNamespace):
    def __len__(self):
        return len(self.tokens)


def chat(tokenizer, question, answer):
    """A question and an answer that is trained, up to and with <|im_end|>."""
    before = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    trained = tokenizer.encode(f"{answer}<|im_end|>")
    after = tokenizer.encode("\n")
    marks = [False] * len(before) + [True] * len(trained) + [False] * len(after)
    return Document(tokens=before + trained + after, is_target=marks)


def batch_of(tokenizer, *documents, length=80):
    row = pack_row([chat(tokenizer, *document) for document in documents], length, pad=0)
    return stack([row, row])


def test_the_mask_is_seen_without_colours(tokenizer):
    batch = batch_of(tokenizer, ("Hi?", "Hello \u00e9\u4e2d!"), ("Bye?", "So long"))
    text = dry_run.first_row(batch, tokenizer, marks=dry_run.MARKS).plain
    assert "<|im_start|>assistant\n>>Hello \u00e9\u4e2d!<|im_end|><<\n" in text
    assert ">>So long<|im_end|><<\n" in text
    assert text.count(">>") == text.count("<<") == 2
    first = chat(tokenizer, "Hi?", "Hello \u00e9\u4e2d!")
    assert f"--- document 0: {len(first) - 1} tokens, {sum(first.is_target)} targets ---\n<|im_start|>user" in text
    assert "--- document 1: " in text
    assert "tokens of padding ---" in text


def test_a_groups_sequences_are_shown_apart(tokenizer):
    pairs = [[chat(tokenizer, question, answer) for answer in ("Hello", "Go")] for question in ("Hi?", "Hey?")]
    groups = [
        packing_plan.Document(
            np.concatenate([d.tokens for d in pair]),
            np.concatenate([d.is_target for d in pair]),
            np.concatenate([np.arange(len(d.tokens)) == 0 for d in pair]),
        )
        for pair in pairs
    ]
    text = dry_run.first_row(stack([pack_groups(groups, 160, 2, pad=0)]), tokenizer, marks=dry_run.MARKS, ranks=2).plain
    chosen, begin = pairs[1][0], "---\n<|im_start|>"
    assert f"--- group 1, chosen: {len(chosen.tokens)} tokens, {sum(chosen.is_target)} targets {begin}" in text
    names = [line.split(":")[0] for line in text.splitlines() if line.startswith("--- group")]
    assert names == [f"--- group {i}, {name}" for i in range(2) for name in ("chosen", "rejected")]
    assert text.count(">>Hello<|im_end|><<\n") == text.count(">>Go<|im_end|><<\n") == 2


def test_the_mask_is_seen_in_colour(tokenizer):
    text = dry_run.first_row(batch_of(tokenizer, ("Hi?", "Hello")), tokenizer)
    targets = [text.plain[s.start : s.end] for s in text.spans if str(s.style).startswith(dry_run.STYLES["target"])]
    special = {text.plain[s.start : s.end] for s in text.spans if "underline" in str(s.style)}
    assert "".join(targets) == "Hello<|im_end|>"
    assert special == {"<|im_start|>", "<|im_end|>"}


def test_data_cannot_command_the_terminal_and_long_rows_are_cut(tokenizer):
    batch = batch_of(tokenizer, ("\x1b[2Jx" * 30, "no"), length=300)
    text = dry_run.first_row(batch, tokenizer, shown=40).plain
    assert "\x1b" not in text and "\\x1b[2Jx" in text
    assert " more tokens" in text


def test_bytes_by_kind():
    config = CONFIGS["dense"]
    specs = model.declare(config)[1]
    trained = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=lambda x: hasattr(x, "hf"))
    state = jax.eval_shape(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))).init, trained
    )
    kinds = dry_run.memory_by_kind(config, trained=trained, optimizer=state, tokens=64)
    four = 4 * flops.parameters(config)
    for name in ("weights, float32", "optimizer: mu", "optimizer: nu", "gradients, float32"):
        assert kinds[name].total == four, name
    assert kinds["weights, bfloat16"].total == four / 2
    assert kinds["optimizer: count"].total == 8
    frozen = dry_run.memory_by_kind(config, trained={"a": jnp.ones(3)}, optimizer={}, frozen=trained, tokens=64)
    assert (frozen["weights, float32"].total, frozen["frozen weights"].total) == (12, four)
    assert "weights, bfloat16" not in frozen


def test_bytes_per_device():
    mesh = jax.make_mesh((1,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    split = SimpleNamespace(shard_shape=lambda shape: (shape[0] // 4, *shape[1:]))
    leaf = SimpleNamespace(shape=(8, 3), dtype=np.float32, sharding=split)
    assert dry_run.size([leaf]) == (96, 24)
    assert dry_run.size([jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding)]) == (96, 96)


@pytest.mark.parametrize("name", ["dense", "moe_mixed"])
def test_more_remat_keeps_less(name):
    kept = [dry_run.kept_per_token(CONFIGS[name], remat) for remat in ("full", "dots", None)]
    assert kept == sorted(kept)
    big = [dry_run.kept_per_token(PRESETS["qwen2-7b"], remat) for remat in ("full", "dots", None)]
    assert big[0] < big[1] / 4 < big[2] / 4


def test_report(tokenizer):
    config = CONFIGS["moe"]
    specs = model.declare(config)[1]
    trained = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=lambda x: hasattr(x, "hf"))
    batch = batch_of(tokenizer, ("Hi?", "Hello"))
    console = Console(file=io.StringIO(), width=120)
    sources = [{"source": "chats.jsonl", "tokens": 12345, "efficiency": 0.875}]
    dry_run.report(
        config, trained=trained, optimizer=jax.eval_shape(optax.adam(1e-3).init, trained), batch=batch,
        tokenizer=tokenizer, console=console, rows=4, steps=10, accumulate=2, sources=sources,
        epochs=[("chats.jsonl", 2.0)],
    )  # fmt: skip
    shown = console.file.getvalue()
    cost = 2 * flops.train_flops(config, flops.segment_lengths(batch.segments_BT))
    for text in (
        f"{flops.parameters(config):,}", f"{flops.active_parameters(config):,}", "4 rows x 80 = 320 tokens",
        "tokens in all", "3,200", f"{cost:.3g}", "chats.jsonl", "12,345", "0.875", "2.00", "optimizer: mu", "together",
        ">>Hello<|im_end|><<",
    ):  # fmt: skip
        assert text in shown, text


def test_a_table_wider_than_the_screen_is_turned():
    """So that no word of it is broken."""
    row = {"records": 6, "untargeted": 0, "documents": 1, "tokens": 22_000, "dropped": 5, "efficiency": 0.344}
    rows = [{"source": f"{name}.jsonl", **row} for name in ("chats", "held-out")]
    for width in (120, 60):
        console = Console(file=io.StringIO(), width=width)
        console.print(dry_run._table(rows, width))
        lines = console.file.getvalue().splitlines()
        assert lines[0].startswith("source")
        words = [line.split()[0] for line in lines[1:]]
        assert words == (["chats.jsonl", "held-out.jsonl"] if width == 120 else [*row])
