# SPDX-License-Identifier: Apache-2.0
"""The bundled checkpoint: its skills on a few items it never saw, through one forward pass and through the chat."""

import jax
import numpy as np
import pytest

import qwen2_jax
from few import slow
from qwen2_jax import checkpoint
from qwen2_jax.data.formats.record_formats import read
from qwen2_jax.data.tokens import packing
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.model import decoder
from qwen2_jax.speedrun import corpus, skills, stdlib_text
from qwen2_jax.speedrun.accuracy import HeldOut
from qwen2_jax.tokenizer import Tokenizer

LENGTH = 512  # one shape for all items: one compiled program


@pytest.fixture(scope="module")
def source():
    return checkpoint.locate("demo")


@pytest.fixture(scope="module")
def encoder(source):
    return Encoder(Tokenizer.from_folder(source.path))


@pytest.fixture(scope="module")
def right(source, encoder):
    """Whether each greedy answer is right: every target is the best token given those before it."""
    config = checkpoint.read_config(source)
    params = checkpoint.load_params(source, config, dtype=np.float32, unroll=False)
    graphdef, _ = decoder.declare(config)

    @jax.jit
    def best(params, batch):
        qwen2 = decoder.nnx.merge(graphdef, params)
        hidden = qwen2(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT).hidden_BTD
        return qwen2.logits(hidden).argmax(-1)

    def score(items):
        rows = []
        for item in items:
            document = encoder.encode(read(corpus.messages([item]), "messages", item.question))
            assert len(document) <= LENGTH
            rows.append(packing.pack_row([document], LENGTH, pad=0))
        batch = packing.stack(rows)
        wrong_BT = (np.asarray(best(params, batch)) != batch.targets_BT) & (batch.weights_BT > 0)
        return ~wrong_BT.any(axis=1)

    return score


@pytest.fixture(scope="module")
def held_out(encoder):
    return HeldOut(encoder.tokenizer, length=LENGTH)


@pytest.mark.parametrize(("skill", "least"), slow(("sums", 0.9), ("compare", 0.85), ("copy", 0.45), ("recall", 0.9)))
def test_held_out_accuracy(skill, least, held_out, right):
    """Bounds for 24 items; the model card has the accuracy on 200.

    Every token must be the expected one here. For copies that is stricter than the model card's equal text (70% against
    83% of 200 items): the model may spell a made-up word with other tokens.
    """
    items = held_out.items(skill, 24, seed=7)
    assert all(stdlib_text.is_held_out(item.key) for item in items)
    got = right(items)
    assert got.mean() >= least, [item.question for item, ok in zip(items, got, strict=True) if not ok]


def test_every_sum_is_on_one_side_of_the_split():
    """About a tenth of the 4095 pairs is held out, and what training draws never meets it."""
    held_out = {(a, b) for a in range(10, 100) for b in range(a, 100) if stdlib_text.is_held_out(f"sum {a} {b}")}
    assert 0.07 < len(held_out) / 4095 < 0.13
    rng = np.random.default_rng(0)
    drawn = [
        skills.draw(rng, make, held_out=False).key for make in (skills.sums, skills.small_sums) for _ in range(2000)
    ]
    assert not {tuple(map(int, key.split()[1:])) for key in drawn} & held_out


def test_it_chats():
    """Greedy, through the whole path: template, prefill, cache, detokenizer."""
    lm = qwen2_jax.load("demo", dtype="float32")
    ask = lambda question: lm.chat([{"role": "user", "content": question}], temperature=0.0, max_new_tokens=48)
    assert ask("hello").text == skills.HELLO
    assert ask("What is 23 + 45?").text == "68"
    answer = ask("Repeat: strawberry jam")
    assert (answer.text, answer.finish_reason) == ("strawberry jam", "stop")
