# SPDX-License-Identifier: Apache-2.0
"""Each format becomes the conversation it means; each mistake is named with place, field, finding and remedy."""

import pytest

from qwen2_jax.data.formats.record_formats import FORMATS, Chat, Text, detect, read
from qwen2_jax.errors import UserError

U, A, S, T = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system", "tool")
)
WHERE = "d.jsonl line 7"

GOOD = {
    "text": ({"text": "a\n"}, Text("a\n")),
    "empty text": ({"text": "", "meta": 1}, Text("")),
    "messages": ({"messages": [S("s"), U("q"), A("a")]}, Chat([S("s"), U("q"), A("a")], [True] * 3)),
    "messages train": (
        {"messages": [U("q") | {"train": False}, A("a") | {"train": False}, U("r"), A("b") | {"train": True}]},
        Chat([U("q"), A("a"), U("r"), A("b")], [False, False, True, True]),
    ),
    "messages weight": (
        {"messages": [U("q"), A("a") | {"weight": 0}, U("r"), A("b") | {"weight": 1}]},
        Chat([U("q"), A("a"), U("r"), A("b")], [True, False, True, True]),
    ),
    "messages from parquet": (  # which fills up absent fields
        {"messages": [U("q") | {"weight": None, "tool_calls": None}, A("a") | {"tool_calls": []}], "tools": None},
        Chat([U("q"), A("a")], [True] * 2),
    ),
    "messages that end with the user": (
        {"messages": [U("q"), A("a"), U("r")]}, Chat([U("q"), A("a"), U("r")], [True] * 3),
    ),
    "messages of UltraChat": ({"prompt": "q", "messages": [U("q"), A("a")]}, Chat([U("q"), A("a")], [True] * 2)),
    "messages with tools": (
        {"messages": [
            U("q"),
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"name": "g", "arguments": {"y": 2}},
            ]},
            T("r") | {"tool_call_id": "1"},
        ]},
        Chat([
            U("q"),
            A("") | {"tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"name": "g", "arguments": {"y": 2}},
            ]},
            T("r") | {"tool_call_id": "1"},
        ], [True] * 3),
    ),
    "sharegpt": (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a", "weight": 0},
        ], "system": "s", "tools": "[]"},
        Chat([
            S("s"), U("q"),
            A("") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            T("r"), A("a"),
        ], [True, True, True, True, False]),
    ),
    "sharegpt roles": (
        {"conversations": [{"from": role, "value": role} for role in ("system", "user", "assistant", "tool")]},
        Chat([S("system"), U("user"), A("assistant"), T("tool")], [True] * 4),
    ),
    "alpaca": ({"instruction": "q", "output": "a"}, Chat([U("q"), A("a")], [True] * 2)),
    "alpaca with all": (
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "text": "x",
         "history": [["q1", "a1"], ("q2", "a2")]},
        Chat([S("s"), U("q1"), A("a1"), U("q2"), A("a2"), U("q\ni"), A("a")], [True] * 7),
    ),
    "alpaca with empty fields": (
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": None},
        Chat([U("q"), A("a")], [True] * 2),
    ),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, Chat([U("q"), A("a")], [True] * 2)),
    "prompt_completion of messages": (
        {"prompt": [S("s"), U("q"), A("a"), U("r")], "completion": [A("b"), U("t"), A("c") | {"weight": 0}]},
        Chat([S("s"), U("q"), A("a"), U("r"), A("b"), U("t"), A("c")], [True, True, False, True, True, True, False]),
    ),
    "prompt_completion mixed": ({"prompt": [U("q")], "completion": "a"}, Chat([U("q"), A("a")], [True] * 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_what_a_record_means(case):
    record, want = GOOD[case]
    format = next(format for format in sorted(FORMATS, key=len, reverse=True) if format in case)
    before = repr(record)
    assert detect(record) == format
    assert read(record, format, WHERE) == read(record, "auto", WHERE) == want
    assert repr(record) == before  # the caller's record is left alone


@pytest.mark.parametrize(
    ("format", "record", "words"),
    [
        ("text", {}, [": no text", "(none)"]),
        ("text", {"Text": "a"}, [": no text", "'Text'"]),
        ("text", {"text": 5}, [": text is 5", "must be text"]),
        ("text", {"text": "a\ud800"}, [": text is not valid Unicode", "character 2"]),
        ("messages", {"conversations": []}, ["no messages", "'conversations'"]),
        ("messages", {"messages": "x"}, ["messages is 'x'", "list"]),
        ("messages", {"messages": []}, ["messages is empty"]),
        ("messages", {"messages": ["x"]}, ["messages[0] is 'x'", "role and content"]),
        ("messages", {"messages": [U("q"), A("a") | {"role": "bot"}]}, ["messages[1] role is 'bot'", "'assistant'"]),
        ("messages", {"messages": [{"content": "x"}]}, ["messages[0] role is None", "'user'"]),
        ("messages", {"messages": [{"role": "user", "text": "x"}]}, ["messages[0] no content", "'role', 'text'"]),
        ("messages", {"messages": [U(["x"])]}, ["messages[0] content is ['x']", "must be text"]),
        ("messages", {"messages": [U("\udfff")]}, ["messages[0] content is not valid Unicode"]),
        ("messages", {"messages": [S("a"), S("b"), U("q")]}, ["2 system messages", "at most one"]),
        ("messages", {"messages": [U("q"), S("b")]}, ["system message is number 2", "first"]),
        ("messages", {"messages": [A("a") | {"train": "no"}]}, ["messages[0] train is 'no'", "true or false"]),
        ("messages", {"messages": [A("a") | {"weight": 0.5}]}, ["messages[0] weight is 0.5", "0 or 1"]),
        ("messages", {"messages": [U("a") | {"weight": 1}]}, ["messages[0] weight is 1", "'user'", "assistant"]),
        ("messages", {"messages": [A("a") | {"tool_calls": "f()"}]}, ["messages[0] tool_calls is 'f()'", "list"]),
        ("messages", {"messages": [A("a") | {"tool_calls": [{"n": 1}]}]}, ["messages[0] tool_calls[0] has no name"]),
        (
            "messages",
            {"messages": [A("a") | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            ["messages[0] tool_calls[0] arguments is not JSON"],
        ),
        ("messages", {"messages": [U("q")], "tools": [{"description": "f"}]}, ["tools[0] has no name"]),
        ("messages", {"messages": [U("q")], "tools": "{"}, ["tools is not JSON"]),
        ("messages", {"messages": [U("q")], "tools": {"name": "f"}}, ["tools is {'name': 'f'}", "list"]),
        (
            "messages",
            {"messages": [U("q") | {"tool_calls": [{"name": "f"}]}]},
            ["messages[0] has tool_calls", "'user'", "only the assistant"],
        ),
        (
            "messages",
            {"messages": [U([{"type": "image_url", "image_url": "x"}])]},
            ["content[0]", "'image_url'", "'text'"],
        ),
        (
            "messages",
            {"messages": [A("a") | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            ["messages[0] tool_calls[0] arguments is [1]", "object"],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            ["conversations[0] value", "JSON"],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]},
            ["conversations[0] value", "name and arguments"],
        ),
        ("messages", {"messages": [U("<image>"), A("a")], "images": ["x.png"]}, [": images is ['x.png']", "text only"]),
        ("messages", {"messages": [U("q"), A("a")], "kto_tag": False}, [": kto_tag is false", "leave the record out"]),
        ("prompt_completion", {"prompt": "q", "completion": "a", "label": False}, [": label is false", "not wanted"]),
        (
            "sharegpt",
            {"conversations": [{"from": "bing", "value": "x"}]},
            ["conversations[0] from is 'bing'", "'human'"],
        ),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, ["conversations[0] no value", "'from'"]),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "system": 3}, [": system is 3"]),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "x"}], "system": "y"},
            ["2 system messages", "at most one"],
        ),
        ("alpaca", {"instruction": "q"}, [": no output", "'instruction'"]),
        ("alpaca", {"instruction": "q", "output": None}, [": no output"]),
        ("alpaca", {"output": "a"}, [": no instruction", "'output'"]),
        ("alpaca", {"instruction": "q", "output": "a", "input": 1}, [": input is 1"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, ["history is 'x'", "pairs"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, ["history[0] is ['x']", "pair"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x", 2]]}, ["history[0] is 2", "text"]),
        ("prompt_completion", {"prompt": "q"}, [": no completion", "a list of messages"]),
        ("prompt_completion", {"prompt": 1, "completion": "a"}, [": prompt is 1", "a list of messages"]),
        ("prompt_completion", {"prompt": "q", "completion": []}, ["completion is empty"]),
        ("prompt_completion", {"prompt": [A(7)], "completion": "a"}, ["prompt[0] content is 7"]),
        ("poems", {"text": "a"}, ["format is 'poems'", "'alpaca'"]),
    ],
)
def test_a_mistake_is_named(format, record, words):
    with pytest.raises(UserError) as error:
        read(record, format, WHERE)
    assert format == "poems" or str(error.value).startswith(f"{WHERE}: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("record", [{}, {"content": "x", "id": 1}, {"text": None}, {"instruction": "q"}])
def test_no_format_fits(record):
    with pytest.raises(UserError, match=f"{WHERE} has the fields") as error:
        read(record, "auto", WHERE)
    for format in FORMATS:
        assert f"{format} needs " in str(error.value)
    for field in record:
        assert repr(field) in str(error.value)
