# SPDX-License-Identifier: Apache-2.0
"""JSON written by others: read, or refused in one line, whatever it holds."""

import functools

import pytest

from mutations import mutated_json, right_or_refused
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.json_text import check_value, parse_json, parse_json_object

GOOD = {"a": 1, "b": [1, {"c": "x"}], "d": {"e": 2.5, "f": None}}


def test_a_byte_order_mark_and_large_numbers_are_read():
    assert parse_json(b'\xef\xbb\xbf{"model_max_length": 1000000000000000000000000000000}', "f") == {
        "model_max_length": 10**30
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "recursion"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("1" * 400, "an integer of 400 digits; at most 100 are read"),
        (r'{"id": "\ud800"}', "surrogates not allowed"),
        (r'{"\ud800": 1}', "surrogates not allowed"),
        (b"\xe9", "utf-8"),
        ("{", "Expecting"),
    ],
)
def test_what_nothing_can_use_is_refused(content, says):
    with pytest.raises(CheckpointError, match=f"^line 3 is not JSON that can be read: .*{says}"):
        parse_json(content, "line 3", CheckpointError)


@pytest.mark.parametrize(("content", "kind"), [("[]", "array"), ('""', "string"), ("1", "number"), ("null", "null")])
def test_an_object_is_asked_for(content, kind):
    with pytest.raises(UserError, match=f"^f holds a JSON {kind} instead of an object$"):
        parse_json_object(content, "f")


def test_mutations(mutations):
    for seed in mutations:
        right_or_refused(seed, lambda seed=seed: parse_json(mutated_json(seed, GOOD), "f"))


def test_values_of_python_may_have_other_keys():
    check_value({1: {"x": ["é"]}, None: {1, 2}})
    with pytest.raises(UnicodeEncodeError):
        check_value({1: ["\ud800"]})
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        check_value(functools.reduce(lambda inner, _: {1: inner}, range(101), 0))
