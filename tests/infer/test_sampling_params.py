# SPDX-License-Identifier: Apache-2.0
"""SamplingParams: limits, what generation_config.json fills in, and that calls, files and flags take every field."""

import dataclasses
import typing

import numpy as np
import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import batch, main
from qwen2_jax.infer.engine.generation_config import NOTHING_STORED, StoredParams
from qwen2_jax.infer.engine.sampling_params import SETTABLE, SamplingKwargs, SamplingParams
from qwen2_jax.infer.lm import LM

INSTRUCT = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
    "eos_token_id": [151645, 151643], "pad_token_id": 151643,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.01), ("top_k", -1), ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.5),
        ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("max_new_tokens", True), ("seed", -1), ("seed", 2**32),
        ("seed", 10**400), ("temperature", 10**400),
        ("temperature", 1e39), ("repetition_penalty", 1e-9), ("max_new_tokens", float("nan")),
        ("seed", [1]), ("eos_ids", (1,)),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 7), ("ignore_eos", 1), ("topp", 0.5),
    ],
)  # fmt: skip
def test_refuses_and_names_the_setting(name, value):
    with pytest.raises(UserError, match=name):
        NOTHING_STORED.resolve({name: value})


def test_numbers_of_other_types_are_taken():
    s = SamplingParams(temperature=1, top_k=np.int64(5), top_p=np.float32(0.5), max_new_tokens=8.0)
    assert (s.temperature, s.top_k, s.top_p, s.max_new_tokens) == (1.0, 5, 0.5, 8)
    assert all(type(x) is float for x in (s.temperature, s.top_p))


def test_without_a_file_the_documented_defaults():
    assert NOTHING_STORED.resolve({"temperature": None, "stop": "x"}, [7]) == SamplingParams(stop=("x",), eos_ids=(7,))


def test_the_file_fills_what_was_not_given():
    s = StoredParams.read(INSTRUCT).resolve({}, [1])
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert s.eos_ids == (151645, 151643)
    s = StoredParams.read(INSTRUCT).resolve({"temperature": 0.0, "top_k": 3})
    assert (s.temperature, s.top_k, s.top_p) == (0.0, 3, 0.8)


def test_do_sample_as_transformers_reads_it():
    base = {"do_sample": False, "temperature": 0.9, "max_new_tokens": 2048, "eos_token_id": 5}
    s = StoredParams.read(base).resolve({})
    assert (s.temperature, s.max_new_tokens, s.eos_ids) == (0.0, 2048, (5,))
    assert StoredParams.read(base).resolve({"temperature": 0.5}).temperature == 0.5
    s = StoredParams.read({"do_sample": True}).resolve({})  # transformers' own defaults for what is left out
    assert (s.temperature, s.top_k, s.top_p) == (1.0, 50, 1.0)


def test_every_keyword_and_flag_is_a_parameter():
    """SamplingKwargs, which editors read, the flags of infer.py and the keys of input lines are SamplingParams' own."""
    assert set(typing.get_type_hints(SamplingKwargs)) | {"max_new_tokens"} == set(SETTABLE)
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - set(SETTABLE) == {"eos_ids", "constraints"}
    flags = vars(main.parser().parse_args([]))
    assert {name: flags[name] for name in SETTABLE} == dict.fromkeys(SETTABLE)
    assert set(batch.ALLOWED) >= set(SETTABLE)
    for method in (LM.generate, LM.chat, LM.stream):
        assert all(name in (method.__doc__ or "") for name in SETTABLE), method
