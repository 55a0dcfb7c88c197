# SPDX-License-Identifier: Apache-2.0
"""Damaged records of every format: what is trained is what was said, or one line names the record."""

import json
from pathlib import Path

import pytest

from mutations import mutated_json, right_or_refused
from qwen2_jax.data.formats.prompts import Prompts
from qwen2_jax.data.formats.record_formats import FORMATS, Chat, Ranking, Text, detect, read
from qwen2_jax.data.sources.records import open_records
from qwen2_jax.data.spec import PromptData
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.speedrun import bpe
from qwen2_jax.tokenizer import Tokenizer
from test_conversation import CALLS, QWEN25

CALL = '{"name": "f", "arguments": {"x": 1}}'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ASKED, ANSWER = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5", "weight": 1}
RECORDS = {
    "text": {"text": "The old mill\nby the river.", "id": 7},
    "messages": {
        "messages": [
            ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS}, {"role": "tool", "content": "[5]"},
            ANSWER, {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
            ANSWER | {"train": True, "content": "Yes."},
        ],
        "system": "Be brief.", "tools": json.dumps(TOOLS),
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What?"}, {"from": "function_call", "value": CALL},
            {"from": "observation", "value": "5"}, {"from": "gpt", "value": "Five.", "loss": True},
        ],
        "system": "Be brief.", "tools": TOOLS,
    },
    "alpaca": {"instruction": "Add.", "input": "2, 3", "output": "5", "system": "s", "history": [["Hi", "Hello."]]},
    "prompt_completion": {"prompt": [ASKED], "completion": "5", "system": None},
    "preference": {"prompt": "2 + 3?", "chosen": [ANSWER], "rejected": "6"},
    "ranked": {"prompt": "2 + 3?", "responses": ["5", "five", "6"], "scores": [2.5, 1, 1]},
    "sharegpt_ranking": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
    },
    "alpaca_ranking": {"instruction": "q", "input": "", "output": ["a", "b"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bpe.train(["Hello world, it is 2024!\n"] * 4, vocab_size=275), {"chat_template": QWEN25})


def said(value) -> list[str]:
    """The texts of all messages."""
    chats = value.chats if isinstance(value, Ranking) else [value]
    return [message["content"] for chat in chats for message in chat.messages]


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_records(tmp_path, tokenizer, mutations, format):
    encoder, file = Encoder(tokenizer), tmp_path / "data.jsonl"

    def use() -> None:
        records = open_records(str(file), tmp_path / "cache")
        for i in range(len(records)):
            document = read(records[i], format, records.where(i))
            encoded = encoder.encode(document)
            text = tokenizer.decode(encoded.tokens, skip_special_tokens=False)
            assert len(encoded.tokens) == len(encoded.is_target)
            if isinstance(document, Text):
                assert text.startswith(document.text)
                continue
            assert isinstance(document, Chat | Ranking)
            assert all(part in text for part in said(document))
            trained = tokenizer.decode(t for t, target in zip(encoded.tokens, encoded.is_target, strict=True) if target)
            if isinstance(document, Chat):
                answers = [
                    m["content"]
                    for m, train in zip(document.messages, document.train, strict=True)
                    if m["role"] == "assistant" and train
                ]
                assert all(answer in trained for answer in answers)

    assert detect(RECORDS[format]) == format
    file.write_text(json.dumps(RECORDS[format]))
    use()
    for seed in mutations:
        file.write_bytes(mutated_json(seed, RECORDS[format]))
        right_or_refused(seed, use)


def test_mutated_prompts(tmp_path: Path, tokenizer, mutations):
    file = tmp_path / "prompts.json"
    good = [
        {"prompt": "2 + 3?", "answer": "5", "system": "Be brief."},
        {"prompt": [ASKED], "tools": TOOLS, "reward_model": {"ground_truth": "5"}},
        {"messages": [ASKED, ANSWER], "level": 3},
    ]

    def use() -> None:
        prompts = Prompts(PromptData(sources=(str(file),)), tokenizer, seed=0, cache=tmp_path / "cache")
        assert prompts.identity
        for prompt in prompts.first(3):
            assert all(message["content"] in tokenizer.decode(prompt.ids) for message in prompt.messages)

    file.write_text(json.dumps(good))
    use()
    for seed in mutations:
        file.write_bytes(mutated_json(seed, good))
        right_or_refused(seed, use)
