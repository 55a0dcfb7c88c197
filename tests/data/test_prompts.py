# SPDX-License-Identifier: Apache-2.0
"""Prompts: what records may look like, what reward functions get of them, and which ones an episode has."""

import json

import pytest

from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.spec import PromptData
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer
from small_run import write_corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_corpus(folder)
    return Tokenizer.from_folder(folder / "tokenizer")


def write(folder, records):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(file)


def opened(folder, tokenizer, records, seed=0, **settings):
    return Prompts(PromptData(sources=(write(folder, records),), **settings), tokenizer, seed=seed, cache=folder)


ASKED = [{"role": "user", "content": "2 + 3?"}]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "2 + 3?", "answer": "5"}, {"answer": "5"}),
        ({"prompt": ASKED, "level": 3}, {"level": 3}),
        ({"messages": [*ASKED, {"role": "assistant", "content": "5"}]}, {"answer": "5"}),
        (
            {"data_source": "gsm", "prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "5"}},
            {"data_source": "gsm", "reward_model": {"style": "rule", "ground_truth": "5"}, "ground_truth": "5"},
        ),
    ],
    ids=["text", "messages", "answered", "verl"],
)
def test_records(tmp_path, tokenizer, record, columns):
    (prompt,) = opened(tmp_path, tokenizer, [record]).first(9)
    assert prompt.messages == ASKED
    assert prompt.columns == columns
    assert prompt.ids == tokenizer.chat_ids(ASKED)
    assert tokenizer.decode(prompt.ids, False).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "2 + 3?"}, r"line 1 has the fields 'question'; a prompt needs the field prompt or messages"),
        ({"prompt": [{"role": "system", "content": "Be brief."}]}, "must end with what the user said"),
        ({"messages": [{"role": "assistant", "content": "5"}]}, "the prompt ends with nothing"),
        ({"prompt": "x", "completions": 1}, "reward functions know completions as something else"),
        ({"prompt": [{"role": "human", "content": "x"}]}, r"line 1: prompt\[0\] role is 'human'"),
        ({"prompt": 3}, "line 1: prompt is 3; it must be text or a list of messages"),
        ({"prompt": {"role": "user", "content": "x"}}, "line 1: prompt is {.*; it must be text or a list of messages"),
        ({"prompt": []}, "line 1: prompt is empty; give at least one message"),
        ({"messages": "x"}, "line 1: messages is 'x'; it must be a list of messages"),
        (
            {"prompt": "x", "tools": [{"name": "f"}]},
            r"line 1: tools\[0\] is 'f', which this tokenizer's chat template leaves out",
        ),
    ],
)
def test_mistakes_name_their_line(tmp_path, tokenizer, record, message):
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, tokenizer, [record])
    assert "prompts.jsonl line 1" in str(error.value)


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer):
    records = [{"prompt": "short"}, {"prompt": "long " * 50}]
    most = len(tokenizer.chat_ids([{"role": "user", "content": "short"}]))
    prompts = opened(tmp_path, tokenizer, records, max_tokens=most)
    assert len(prompts) == 1
    assert prompts.report()[0]["dropped"] == 1
    with pytest.raises(UserError, match="raise it"):
        opened(tmp_path, tokenizer, records, max_tokens=most - 1)


def test_episodes_are_a_function_of_seed_and_number(tmp_path, tokenizer):
    records = [{"prompt": f"number {i}"} for i in range(10)]
    one, same, other = (opened(tmp_path, tokenizer, records, seed=seed) for seed in (0, 0, 1))
    asked = lambda prompts, n: [prompt.messages[0]["content"] for prompt in prompts.batch(n, 4)]
    straight = [asked(one, n) for n in range(5)]
    assert [asked(same, n) for n in (3, 1)] == [straight[3], straight[1]]
    assert [asked(other, n) for n in range(5)] != straight
    flat = [text for texts in straight for text in texts]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == sorted(f"number {i}" for i in range(10))  # each once a pass
    assert flat[:10] != flat[10:20]  # in an order of its own
    given = one.subset([7, 2, 5], as_given=True)
    assert [prompt.messages[0]["content"] for prompt in given.batch(0, 4)] == [f"number {i}" for i in (7, 2, 5, 7)]
    assert {text for n in range(3) for text in asked(one.subset([7, 2], as_given=False), n)} == {"number 2", "number 7"}


def test_other_prompts_are_another_identity(tmp_path, tokenizer):
    found = [opened(tmp_path, tokenizer, [{"prompt": "a", "answer": x}]).identity for x in ("1", "2", "1")]
    assert found[0] == found[2] != found[1]


def test_sources_are_a_tuple():
    with pytest.raises(UserError, match="mind the comma"):
        PromptData(sources="prompts.jsonl")
