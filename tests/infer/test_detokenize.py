# SPDX-License-Identifier: Apache-2.0
"""Text while tokens arrive: nothing shown is taken back, stop texts cut text and tokens alike."""

import random

import pytest

from qwen2_jax.infer.detokenize import IncrementalDetokenizer, held_back
from qwen2_jax.infer.engine.sampling_params import SamplingParams


def play(tokenizer, ids, **settings):
    """(pieces, generation) of an answer that gets these ids one by one and then ends for its length."""
    answer = IncrementalDetokenizer(tokenizer, SamplingParams(**settings))
    pieces = []
    for n, token in enumerate(ids):
        pieces.append(answer.add(token, -float(n)))
        if answer.reason:
            break
    else:
        pieces.append(answer.finish("length"))
    return pieces, answer.generation()


def test_no_half_characters(bytes_tokenizer):
    text = "naïve \U0001f600 ok"
    pieces, generation = play(bytes_tokenizer, bytes_tokenizer.encode(text))
    assert "".join(pieces) == generation.text == text
    assert not any("�" in piece for piece in pieces)
    _, cut = play(bytes_tokenizer, bytes_tokenizer.encode(text)[:3])  # ends inside the character
    assert cut.text == "na�"
    assert len(cut.token_ids) == 3


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("END", "one two ", 8), ("o", "", 0), ("two END three", "one ", 4), ("ne", "o", 1), ("absent", None, None),
        (("three", "two"), "one ", 4), ("ENDx", None, None), ("END three", "one two ", 8),
    ],
)  # fmt: skip
def test_stop_texts_cut_text_and_tokens(bytes_tokenizer, stop, text, tokens):
    full = "one two END three"
    pieces, generation = play(bytes_tokenizer, bytes_tokenizer.encode(full), stop=stop)
    assert "".join(pieces) == generation.text == (full if text is None else text)
    assert len(generation.token_ids) == len(generation.logprobs) == (len(full) if tokens is None else tokens)
    assert generation.finish_reason == ("length" if text is None else "stop")


def test_random_texts_and_stops(bytes_tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abé") for _ in range(rng.randint(1, 20)))
        stops = tuple("".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        pieces, generation = play(bytes_tokenizer, bytes_tokenizer.encode(text), stop=stops)
        assert "".join(pieces) == generation.text
        assert not any(s in generation.text for s in stops)
        if any(s in text for s in stops):
            assert generation.finish_reason == "stop"
            assert text.startswith(generation.text)
            assert any(text[len(generation.text) :].startswith(s) for s in stops)
        else:
            assert generation.text == text
        assert bytes_tokenizer.decode(generation.token_ids) == generation.text


def test_the_end_token_is_a_token_and_not_text(bytes_tokenizer):
    ids = [*bytes_tokenizer.encode("hi"), ord("!")]
    _, generation = play(bytes_tokenizer, ids, eos_ids=(ord("!"),))
    assert (generation.text, generation.token_ids) == ("hi", ids)
    _, generation = play(bytes_tokenizer, ids, eos_ids=(ord("!"),), ignore_eos=True)
    assert generation.text == "hi!"


def test_without_a_tokenizer_tokens_alone():
    pieces, generation = play(None, [5, 6])
    assert ("".join(pieces), generation.text, generation.token_ids) == ("", "", [5, 6])


def test_held_back_is_the_longest_beginning_of_a_stop():
    assert held_back("abcEN", ("END",)) == 2
    assert held_back("aaa", ("aaab", "aab")) == 3
    assert held_back("abc", ()) == held_back("", ("x",)) == 0
