# SPDX-License-Identifier: Apache-2.0
"""Formats of records: text, conversation or ranked responses. Errors name location, field and remedy.

    text               {"text": "..."}
    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}], "system": "..."}
    alpaca             {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["q", "a"]]}
    prompt_completion  {"prompt": "...", "completion": "..."}, each a string or a list of messages

and the formats of rankings.py. Each conversation may also have "system": "..." and "tools": [...]. A null field counts
as absent, because Parquet writes absent fields as null.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen2_jax import validate
from qwen2_jax.data.formats import messages, rankings
from qwen2_jax.data.formats.messages import Chat
from qwen2_jax.data.formats.rankings import Ranking
from qwen2_jax.errors import UserError

Format = Literal[
    "text", "messages", "sharegpt", "alpaca", "prompt_completion",
    "preference", "ranked", "sharegpt_ranking", "alpaca_ranking",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)

# The fields that identify a format, in the order of the checks: UltraChat has a prompt besides its messages,
# UltraFeedback also a pair, Alpaca a text besides its instruction.
TELLING = (
    ("messages", ("messages",)),
    ("sharegpt_ranking", ("conversations", "chosen", "rejected")),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("text", ("text",)),
    ("alpaca_ranking", ("instruction", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),
    ("ranked", ("prompt", "responses")),
)


@dataclass(frozen=True)
class Text:
    """A plain-text document."""

    text: str


Document = Text | Chat | Ranking


def detect(record: Mapping[str, Any], where: str = "the first record") -> str:
    """The format that the record's fields identify. An Alpaca record whose output is a list is a ranking."""
    for format, fields in TELLING:
        if all(record.get(field) is not None for field in fields):
            return "alpaca_ranking" if format == "alpaca" and isinstance(record["output"], list) else format
    needs = "; ".join(f"{format} needs {' and '.join(fields)}" for format, fields in TELLING)
    raise UserError(f"{where} has the fields {messages.fields(record)}, which fit no format: {needs}")


def read(record: Mapping[str, Any], format: str, where: str) -> Document:
    """Parses a record in this format ("auto": detected from its fields). where: its location, for errors.

    Every conversation may have a field `system`, its system message, and `tools`, what the assistant may call.
    """
    if format == "auto":
        format = detect(record, where)
    validate.choice("format", format, FORMATS)
    if format == "text":
        return Text(messages.text(record, "text", where))
    record = messages.without_filled_nulls(record)
    if format in rankings.READERS:
        return rankings.read(record, format, where)
    parsed = {
        "messages": _messages,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
    }[format](record, where)
    chat = messages.opening(record, where) + parsed
    messages.check_conversation(chat, where)
    return chat


def _messages(record: Mapping[str, Any], where: str) -> Chat:
    return messages.messages(record, "messages", where)


def _sharegpt(record: Mapping[str, Any], where: str) -> Chat:
    return messages.turns(record, "conversations", where)


def _alpaca(record: Mapping[str, Any], where: str) -> Chat:
    return messages.question(record, where) + messages.said("assistant", messages.text(record, "output", where))


def _prompt_completion(record: Mapping[str, Any], where: str) -> Chat:
    """Answers within the prompt are not targets; a string is one message."""
    prompt = messages.side(record, "prompt", "user", where)
    asked = [message["role"] != "assistant" for message in prompt.messages]
    return Chat(prompt.messages, asked) + messages.side(record, "completion", "assistant", where)
