# SPDX-License-Identifier: Apache-2.0
"""Every input is read, tokenized and checked once; ids seen are recorded only for a repetition penalty."""

import collections
import io
import sys

import jax
import pytest

import qwen2_jax
from qwen2_jax.chat_template import ChatTemplate
from qwen2_jax.checkpoint import Source
from qwen2_jax.infer.cli import main
from qwen2_jax.infer.engine.programs import Generator
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def calls(monkeypatch):
    """Counts calls by name from here on."""
    counted = collections.Counter()

    def count(owner, method, name=None):
        original = getattr(owner, method)

        def counting(self, *args, **kwargs):
            counted[name or args[0]] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(Source, "read_json")  # under the file's name
    count(SamplingParams, "__post_init__", "sampling parameters")
    count(Generator, "check", "prompts checked")
    count(ChatTemplate, "render", "templates")
    count(Tokenizer, "encode", "encoded")
    return counted


ONCE = {"sampling parameters": 1, "prompts checked": 1}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda lm: lm.generate(["hi"], 2), ONCE | {"encoded": 1}),
        (
            lambda lm: lm.generate(["hi", "a"], 2, temperature=1.0, seed=[1, 2]),
            dict.fromkeys((*ONCE, "encoded"), 2),
        ),
        (lambda lm: lm.generate([[104, 105]], 2), ONCE),
        (lambda lm: list(lm.stream("hi", 2)), ONCE | {"encoded": 1}),
        (lambda lm: lm.chat(MESSAGES, 2), ONCE | {"templates": 1}),
        (lambda lm: list(lm.stream(MESSAGES, 2)), ONCE | {"templates": 1}),
    ],
)
def test_a_request_is_tokenized_and_checked_once(lm, calls, call, expected):
    call(lm)
    if "templates" in expected:
        calls.pop("encoded")  # once for each part between special tokens
    assert dict(calls) == expected


def test_the_files_of_a_checkpoint_are_read_once(calls, monkeypatch, capsys):
    qwen2_jax.load("demo")
    assert (calls["config.json"], calls["generation_config.json"]) == (1, 1)
    calls.clear()
    monkeypatch.setattr(main, "_compilation_cache", lambda jax: None)  # it would serve all tests after this one
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main.main(["--raw", "a", "--max-new-tokens", "1", "--top-k", "3"]) == 0
    capsys.readouterr()
    assert (calls["config.json"], calls["generation_config.json"]) == (1, 1)
    assert {name: calls[name] for name in ONCE} == ONCE


def test_ids_seen_are_recorded_only_for_a_penalty(lm):
    """The penalty of one row makes no difference to the row beside it."""

    def started(**given):
        return lm.generator.start([lm.request("hi", **given), lm.request("a", temperature=1.0)])

    assert started()._state.seen_BV is None
    assert started(temperature=1.5)._state.seen_BV is None
    assert started(repetition_penalty=1.5)._state.seen_BV.shape == (2, lm.config.vocab_size)
    requests = [
        [lm.request("hi", temperature=1.0, repetition_penalty=penalty), lm.request("a", temperature=1.0, seed=3)]
        for penalty in (1.0, 1.5)
    ]
    plain, penalised = (lm.run(both) for both in requests)
    assert plain[1] == penalised[1]
    assert plain[0] != penalised[0]
    sizes = {
        sum(leaf.nbytes for leaf in jax.tree.leaves(batch._state))
        for batch in (started(), started(repetition_penalty=1.5))
    }
    assert max(sizes) - min(sizes) == 2 * lm.config.vocab_size
