# SPDX-License-Identifier: Apache-2.0
"""What `qwen2_jax.load` returns: text in, text out, the checkpoint's defaults, and errors that say what to do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen2_jax
from qwen2_jax.errors import UserError
from qwen2_jax.infer import lm as lm_module
from qwen2_jax.infer.cli import batch
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.lm import LM
from qwen2_jax.model import declare
from qwen2_jax.tokenizer import IM_END, Tokenizer
from qwen2_jax.weights.int8 import quantize
from tiny import random_params
from tolerance import close

PROMPTS = ["The quick brown fox", "a", "Zwölf Boxkämpfer jagen"]


@pytest.fixture(scope="module")
def folder(lm, bytes_tokenizer, tmp_path_factory):
    """The tiny model as a Hugging Face folder with tokenizer and generation settings."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    lm.save(path)
    bytes_tokenizer._backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 30, "eos_token_id": [258, 256], "max_new_tokens": 11}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def test_text_and_ids_are_the_same_prompt(lm):
    by_text = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    by_ids = lm.generate([lm.tokenizer.encode(p) for p in PROMPTS], max_new_tokens=12, ignore_eos=True)
    assert by_text == by_ids
    for generation in by_text:
        assert len(generation.token_ids) == len(generation.logprobs) == 12
        assert generation.text == lm.tokenizer.decode(generation.token_ids)
        assert generation.finish_reason == "length"


def test_logprobs_agree_with_logits_and_with_generation(lm):
    prompt = lm.tokenizer.encode(PROMPTS[0])
    generation = lm.generate([prompt], max_new_tokens=8)[0]
    ids = np.asarray([prompt + generation.token_ids])
    scores = lm.logprobs(ids)
    assert scores.shape == (1, ids.shape[1] - 1)
    assert scores.dtype == np.float32
    close(scores[0, len(prompt) - 1 :], generation.logprobs)
    logits = lm.logits(ids)
    assert (logits.shape, logits.dtype) == ((*ids.shape, lm.config.vocab_size), np.float32)
    all_logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    want = np.take_along_axis(all_logprobs[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    close(scores, want)
    ragged = lm.logprobs([prompt, prompt[:5], *[[1, 2, 3]] * 4])  # more rows than a batch holds
    assert [len(r) for r in ragged] == [len(prompt) - 1, 4, 2, 2, 2, 2]
    close(ragged[1], scores[0, :4])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3, "stop": ["e", "q"]}, {"stop": "\n"}])
def test_a_stream_adds_up_to_the_answer(lm, settings):
    for prompt in PROMPTS[:2]:
        stream = lm.stream(prompt, max_new_tokens=40, **settings)
        pieces = list(stream)
        assert stream.generation == lm.generate([prompt], max_new_tokens=40, **settings)[0]
        assert "".join(pieces) == stream.generation.text
        assert 0 < stream.first_seconds <= stream.seconds


def test_seeds_do_not_depend_on_company(lm):
    drawn = lm.generate(PROMPTS, max_new_tokens=16, temperature=1.2, seed=11)
    assert drawn[1].token_ids == lm.generate(["a"], max_new_tokens=16, temperature=1.2, seed=11)[0].token_ids
    many = lm.generate(["a"] * 6, max_new_tokens=16, temperature=1.2, seed=[11, 1, 2, 3, 4, 11])
    assert many[0].token_ids == many[5].token_ids == drawn[1].token_ids
    assert len({tuple(g.token_ids) for g in many}) == 5


def test_padded_ids_are_never_drawn(lm):
    """The embedding has 272 rows and the tokenizer 259 tokens; so hot a draw would take one of the 13 in 94 of 100."""
    drawn = lm.generate(["a"] * 4, max_new_tokens=60, temperature=9.0, seed=[1, 2, 3, 4], ignore_eos=True)
    assert max(max(g.token_ids) for g in drawn) < 259


def test_stop_texts(lm):
    free = lm.generate(["a"], max_new_tokens=30)[0]
    stop = free.text[8:10]
    cut = lm.generate(["a"], max_new_tokens=30, stop=["never there", stop])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.logprobs) == len(cut.token_ids) < 30


def test_a_folder_brings_its_defaults_and_travels(lm, folder, tmp_path):
    loaded = qwen2_jax.load(str(folder), dtype="float32")
    assert loaded.config == lm.config
    assert len(loaded.generate(["ab"])[0].token_ids) <= 11
    same = loaded.generate(["ab"], max_new_tokens=6)
    assert same == lm.generate(["ab"], max_new_tokens=6, temperature=0.9, top_k=30)
    assert loaded.generate(["ab"], max_new_tokens=6, temperature=0.0) == lm.generate(["ab"], max_new_tokens=6)
    assert loaded.is_chat
    assert not lm.is_chat or lm.tokenizer.eos_id == 258
    messages = [{"role": "user", "content": "hi"}]
    assert (
        loaded.chat(messages, max_new_tokens=5)
        == loaded.generate([loaded.tokenizer.chat_ids(messages)], max_new_tokens=5)[0]
    )
    assert loaded.request(messages).sampling_params.eos_ids == (258, 256)
    assert lm.request(messages).sampling_params.eos_ids == (
        256,
        258,
    )  # the end of a turn, which its config does not name
    for format in ("hf", "orbax"):
        loaded.save(tmp_path / format, format=format)
        again = qwen2_jax.load(tmp_path / format, dtype="float32")
        assert again.generation_config == loaded.generation_config
        assert again.tokenizer.chat_ids(messages) == loaded.tokenizer.chat_ids(messages)
        jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    with pytest.raises(UserError, match="format='gguf'"):
        loaded.save(tmp_path / "x", format="gguf")


def test_tools_reach_the_chat_template(lm, bytes_tokenizer):
    """In chat, in stream and in a line of --input; a prompt without messages has none."""
    template = "{% for t in tools or [] %}{{ t['function']['name'] }};{% endfor %}{{ messages[0]['content'] }}"
    tokenizer = Tokenizer(bytes_tokenizer._backend, {"eos_token": IM_END, "chat_template": template})
    able = LM(lm.config, lm.params, tokenizer=tokenizer, dtype="float32", unroll=True)
    function = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}
    asked = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": function}]}
    assert able.request(asked["messages"], asked["tools"]).tokens == tuple(b"now;hi")
    assert able.request(asked["messages"]).tokens == tuple(b"hi")
    want = able.generate([list(b"now;hi")], max_new_tokens=4, ignore_eos=True)[0]
    given = {"tools": asked["tools"], "max_new_tokens": 4, "ignore_eos": True}
    assert able.chat(asked["messages"], **given) == want
    assert "".join(able.stream(asked["messages"], **given)) == want.text
    assert batch._request(able, asked, {}, None, False).tokens == tuple(b"now;hi")
    with pytest.raises(UserError, match="tools belong to a conversation"):
        able.stream("hi", tools=asked["tools"])


def test_without_a_tokenizer_ids_still_work(lm):
    bare = LM(lm.config, lm.params, dtype="float32", unroll=True)
    generation = bare.generate([[104, 105]], max_new_tokens=4)[0]
    assert generation.token_ids == lm.generate(["hi"], max_new_tokens=4)[0].token_ids
    assert generation.text == ""
    for call in (
        lambda: bare.generate(["hi"]), lambda: bare.chat([{"role": "user", "content": "hi"}]),
        lambda: bare.generate([[1]], stop="x"), lambda: bare.stream("hi"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="tokenizer"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.generate([]), "not empty"), (lambda lm: lm.generate("text"), "needs a list"),
        (lambda lm: lm.generate([1, 2]), r"\[\[1"), (lambda lm: lm.generate([""]), "prompt is empty"),
        (lambda lm: lm.generate([[]]), "not empty"), (lambda lm: lm.generate([[1, -1]]), "id -1"),
        (lambda lm: lm.generate([[272]]), "id 272"), (lambda lm: lm.generate(["a"], temperature=-1), "temperature=-1"),
        (lambda lm: lm.generate(["a"], top_p=0), "top_p=0"),
        (lambda lm: lm.generate(["a"], max_new_tokens=0), "max_new_tokens=0"),
        (lambda lm: lm.generate(["a", "b"], seed=[1]), "1 seeds for 2"), (lambda lm: lm.generate([[0.5]]), "token ids"),
        (lambda lm: lm.generate(["x" * 3000]), "3000 tokens"), (lambda lm: lm.stream("x" * 3000), "3000 tokens"),
        (lambda lm: lm.chat([]), "messages is empty"), (lambda lm: lm.chat("hi"), "messages is 'hi'"),
        (lambda lm: lm.logits([1, 2]), r"\[B, T\]"), (lambda lm: lm.logits([[1], [2, 3]]), "equal length"),
        (lambda lm: lm.logprobs([]), "not empty"), (lambda lm: lm.logits([[999]]), "id 999"),
        (lambda lm: LM(lm.config, lm.params, long_context="on"), "long_context='on'"),
        (lambda lm: qwen2_jax.load("demo", dtype="int3"), "dtype='int3'"),
        (lambda lm: qwen2_jax.load("/no/such/folder"), "/no/such/folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named(lm, call, message):
    with pytest.raises(UserError, match=message):
        call(lm)


def test_what_cannot_fit_is_refused_before_loading(lm, folder, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda devices=None: 1000)
    monkeypatch.setattr(lm_module.checkpoint, "load_params", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"need \d+ bytes; 1000 bytes"):
        qwen2_jax.load(folder)
    with pytest.raises(UserError, match=r"needs \d+ bytes .*1000 bytes"):
        lm.generate(["a"])


def test_free_memory_is_known_here():
    free = memory.free_bytes()
    assert free is None or 0 < free < 2**50


@pytest.mark.slow  # quick: test_forms.py and test_parity.py
def test_bfloat16_and_int8_stay_close_to_float32(lm, bytes_tokenizer, tmp_path):
    exact = lm.generate(["abc"], max_new_tokens=1)[0].logprobs[0]
    for rounded in (False, True):
        weights = random_params(lm.config, unroll=True, dtype=jnp.bfloat16)
        if rounded:
            weights = quantize(weights, declare(lm.config, unroll=True)[1])
        half = LM(lm.config, weights, tokenizer=bytes_tokenizer, dtype="bfloat16", unroll=True)
        assert half.generate(["abc"], max_new_tokens=5)[0].logprobs[0] == pytest.approx(exact, abs=0.3)
    with pytest.raises(UserError, match="int8"):
        half.save(tmp_path / "copy")
