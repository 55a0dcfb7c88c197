# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: every key is obeyed as transformers obeys it, refused, or named as one without effect."""

import dataclasses
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import qwen2_jax
from mutations import mutated_json, right_or_refused
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.infer.engine.generation_config import NOTHING_STORED, StoredParams
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.lm import LM
from tiny import random_params

SHARED = Path(__file__).parents[3] / "shared" / "data"
RECORDED = SHARED / "reports" / "generation-config"
here = pytest.mark.skipif(not SHARED.exists(), reason="the recorded cases lie outside the repository")


def answers(lm, *asked):
    """Token ids of (prompt ids, generation_config, given), in one batch."""
    requests = [Request(tuple(ids), StoredParams.read(stored).resolve(given)) for ids, stored, given in asked]
    return [tokens for tokens, _, _ in lm.generator.run(requests)]


@here
def test_greedy_answers_are_those_of_transformers():
    """All in one batch: the constraints of one row are not those of the rows beside it."""
    recorded = json.loads((RECORDED / "expected.json").read_text())
    stored = {
        name: json.loads((RECORDED / f"generation_config.{name}.json").read_text()) for name in recorded["greedy"]
    }
    lm = qwen2_jax.load(RECORDED, dtype="float32")
    asked = [(recorded["prompt_ids"], one, {}) for one in stored.values()]
    assert answers(lm, *asked) == list(recorded["greedy"].values())
    alone = LM(lm.config, lm.params, generation_config=stored["max_length"], dtype="float32", unroll=True)
    assert alone.generate([recorded["prompt_ids"]])[0].token_ids == recorded["greedy"]["max_length"]


def by_hand(free, prompt, count, barred):
    """The greedy answer of the tiny model, token by token, where `barred(tokens)` are the ids that may not follow."""
    tokens = list(prompt)
    for _ in range(count):
        scores = free(tokens)
        scores[list(barred(tokens))] = -np.inf
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


def ngrams(size):
    def barred(tokens):
        before = tokens[len(tokens) - size + 1 :] if size > 1 else []
        runs = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
        return {run[-1] for run in runs if run[:-1] == before}

    return barred


def words(*given):
    def barred(tokens):
        return {w[-1] for w in given if len(w) <= len(tokens) and tokens[len(tokens) + 1 - len(w) :] == list(w[:-1])}

    return barred


def test_each_constraint_is_what_its_definition_says(lm):
    """Against masks by hand over the logits of whole sequences; rows with constraints beside one with none."""
    prompt = [7, 8, 7, 8, 7]
    free = lambda tokens: lm.logits([tokens])[0, -1, : lm.generator.vocab_size].copy()
    plain = by_hand(free, prompt, 6, lambda _: set())
    second = [tuple(plain[:2]), (plain[0], plain[1], plain[2]), (250,), (8, 7, 8, 7, plain[0])]
    cases = [
        ({}, lambda _: set()),
        ({"no_repeat_ngram_size": 1}, ngrams(1)),
        ({"no_repeat_ngram_size": 2}, ngrams(2)),
        ({"no_repeat_ngram_size": 3}, ngrams(3)),
        ({"no_repeat_ngram_size": 2**40}, lambda _: set()),
        ({"bad_words_ids": [list(word) for word in second]}, words(*second)),
        ({"begin_suppress_tokens": plain[:1]}, lambda t: {plain[0]} if len(t) == len(prompt) else set()),
        ({"min_length": len(prompt) + 2, "eos_token_id": plain[0]}, lambda t: {plain[0]} if len(t) < 7 else set()),
    ]
    got = answers(lm, *[(prompt, stored, {"max_new_tokens": 6}) for stored, _ in cases])
    for (stored, barred), tokens in zip(cases, got, strict=True):
        want = by_hand(free, prompt, 6, barred)
        if "eos_token_id" in stored:
            want = want[: next((n + 1 for n, t in enumerate(want) if t == plain[0]), None)]
        assert tokens == want, stored


@pytest.mark.slow  # quick: greedy ones
def test_sampled_answers_heed_them_too(lm):
    barred = list(range(250))
    stored = {"suppress_tokens": barred, "forced_eos_token_id": 256, "eos_token_id": 256, "min_new_tokens": 5}
    given = {"max_new_tokens": 12, "temperature": 3.0}
    rows = [([1, 2, 3], stored, given | {"seed": seed, "repetition_penalty": 1.0 + seed % 2}) for seed in range(4)]
    for tokens in answers(lm, *rows):
        assert set(tokens) <= set(range(250, 259))
        assert len(tokens) > 5
        assert 256 not in tokens[:5]
        assert tokens[-1] == 256
    free = answers(lm, ([1, 2, 3], {}, given), rows[1])  # a row without constraints has the tokens of a batch without
    assert free[0] == answers(lm, ([1, 2, 3], {}, given))[0]


def test_nothing_more_is_traced_without_constraints(lm):
    stored = NOTHING_STORED.resolve({"max_new_tokens": 2})
    plain = lm.generator.start([lm.generator.check(Request((1, 2), stored))])
    assert plain._state.tokens_BS is None
    masked = StoredParams.read({"suppress_tokens": [3]}).resolve({"max_new_tokens": 2})
    assert lm.generator.start([lm.generator.check(Request((1, 2), masked))])._state.tokens_BS is None
    history = StoredParams.read({"no_repeat_ngram_size": 2}).resolve({"max_new_tokens": 2})
    assert lm.generator.start([lm.generator.check(Request((1, 2), history))])._state.tokens_BS.shape == (1, 256)


def test_max_length_counts_the_prompt_and_gives_way_to_max_new_tokens(lm):
    stored = {"max_length": 9}
    assert [len(t) for t in answers(lm, ([1] * 5, stored, {}), ([1] * 8, stored, {}))] == [4, 1]
    assert len(answers(lm, ([1] * 12, stored, {"max_new_tokens": 3}))[0]) == 3
    assert len(answers(lm, ([1] * 5, stored | {"max_new_tokens": 2}, {}))[0]) == 2
    with pytest.raises(UserError, match="the prompt has 9 tokens.* max_length 9 .*give max_new_tokens"):
        answers(lm, ([1] * 9, stored, {}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", 2002.0, "a token id"), ("eos_token_id", [1, "x"], "a token id"), ("eos_token_id", True, "id"),
        ("eos_token_id", 2**40, "a token id"), ("eos_token_id", [*range(9)], "at most 8"),
        ("do_sample", "yes", "true or"),
        ("top_k", -1, "0 .off. or above"), ("top_p", "x", "above 0"), ("max_new_tokens", 0, "at least 1"),
        ("max_length", 0, "1 or above"), ("min_new_tokens", -1, "0 or above"), ("no_repeat_ngram_size", 1.5, "whole"),
        ("bad_words_ids", [[]], "none empty"), ("bad_words_ids", [3], "lists of token ids"),
        ("bad_words_ids", 3, "list"),
        ("bad_words_ids", [[1.0]], "list"), ("suppress_tokens", "x", "list of them"),
        ("suppress_tokens", [[1]], "them"),
        ("forced_eos_token_id", 0.5, "token id"), ("bad_words_ids", [[*range(65)]], "at most 20000"),
        ("repetition_penalty", 1e300, "from 0.000001"), ("min_p", float("nan"), "from 0"),
    ],
)  # fmt: skip
def test_refuses_and_names_file_key_and_what_is_allowed(lm, key, value, words):
    with pytest.raises(UserError, match=f"^generation_config.json: .*{key}.*{words}|end-of-sequence.*{words}"):
        LM(lm.config, lm.params, generation_config={key: value}, dtype="float32", unroll=True).request([1])


def test_ids_that_do_not_exist_are_left_out():
    assert StoredParams.read({"eos_token_id": [2002, None]}).ends([1]) == (2002,)
    assert StoredParams.read({"eos_token_id": [None]}).ends([1]) == (1,)
    assert StoredParams.read({"eos_token_id": None}).ends([1, None]) == (1,)
    assert StoredParams.read({"eos_token_id": -1}).ends([1]) == ()
    assert StoredParams.read({"eos_token_id": [5] * 50}).ends([1]) == (5,)


def test_keys_without_effect_are_named_once(lm):
    stored = {
        "num_beams": 4, "exponential_decay_length_penalty": [5, 1.1], "made_up": "x", "stop_strings": ["a"],
        "typical_p": 1.0, "num_return_sequences": 1, "pad_token_id": 3, "use_cache": False, "_from_model_config": True,
        "guidance_scale": None, "length_penalty": 2.0, "top_k": 3,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="without effect") as told:
        LM(lm.config, lm.params, generation_config=stored, dtype="float32", unroll=True)
    assert [str(one.message) for one in told] == [
        "generation_config.json has settings without effect here: exponential_decay_length_penalty = [5, 1.1], "
        "made_up = 'x', num_beams = 4, stop_strings = ['a']"
    ]


@pytest.mark.parametrize("top_k", [2**31, 2**40])
def test_a_top_k_above_the_vocabulary_keeps_every_token(lm, top_k):
    hot = {"temperature": 2.0, "max_new_tokens": 5, "seed": 3}
    assert answers(lm, ([1, 2], {"top_k": top_k}, hot)) == answers(lm, ([1, 2], {}, hot))


def test_the_coldest_temperature_is_greedy(lm):
    cold, greedy = answers(lm, ([1, 2], {}, {"temperature": 1e-44}), ([1, 2], {}, {"temperature": 0.0}))
    assert cold == greedy


GOOD = {
    "bos_token_id": 256, "pad_token_id": 256, "do_sample": True, "eos_token_id": [258, 256], "temperature": 0.7,
    "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05, "max_new_tokens": 4, "max_length": 9,
    "min_new_tokens": 2, "min_length": 6, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]],
    "suppress_tokens": [9, 10], "begin_suppress_tokens": [11], "forced_eos_token_id": 258, "num_beams": 1,
    "transformers_version": "5.0.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def short(lm):
    """The tiny model with a context of 24 tokens: a mutated limit cannot make long answers."""
    config = dataclasses.replace(lm.config, max_position_embeddings=24)
    return LM(config, random_params(config, unroll=True), dtype="float32", unroll=True, long_context="off").generator


def test_mutated_files_are_obeyed_or_refused(short, mutations):
    prompt, accepted = (5, 6, 5), []
    for seed in mutations:

        def read(content=mutated_json(seed, GOOD)):  # noqa: B008
            with warnings.catch_warnings(action="ignore"):
                data = parse_json_object(content, "generation_config.json")
                return data, short.check(Request(prompt, StoredParams.read(data).resolve({}, [256])), "off")

        outcome = right_or_refused(seed, read)
        if not isinstance(outcome, UserError):
            accepted.append((seed, *outcome))
    for start in range(0, len(accepted), 8):
        some = accepted[start : start + 8]
        got = short.run([request for _, _, request in some], "off")
        for (seed, data, _), (tokens, logprobs, _) in zip(some, got, strict=True):
            obeyed(data, prompt, tokens)
            assert np.isfinite(logprobs).all(), seed
    assert len(accepted) > len(mutations) / 10


def obeyed(data, prompt, tokens):
    """Whether an answer keeps what its file says, read here without the code under test."""
    whole, limit = [*prompt, *tokens], data.get("max_new_tokens")
    assert 0 < len(tokens) <= (24 - len(prompt) if limit is None else limit)
    assert limit is not None or data.get("max_length") is None or len(whole) <= data["max_length"]
    if data.get("forced_eos_token_id") is not None:
        del whole[-1]  # overrides the others
    if isinstance(data.get("suppress_tokens"), list):
        assert not {*whole[len(prompt) :]} & {*data["suppress_tokens"]}
    if data.get("no_repeat_ngram_size") == 2:
        pairs = [*itertools.pairwise(whole)]
        assert len({*pairs}) == len(pairs)
