# SPDX-License-Identifier: Apache-2.0
"""Parses conversations from records: message lists, ShareGPT turns, Alpaca questions, plain strings, tools.

Messages are checked as in chat (conversation.py). Errors name the record's location, the field and the remedy. where:
the record's location, for error messages.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_jax import validate
from qwen2_jax.conversation import checked_message
from qwen2_jax.data.sources.parquet_arrow import TableRow
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json
from qwen2_jax.tool_schema import checked_tools

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


# Keys of a message that say whether it is trained: "train", OpenAI's and LLaMA-Factory's "weight", ms-swift's "loss".
FLAGS = {"train": "true or false", "weight": "0 or 1", "loss": "true or false"}
NOT_TEXT = ("images", "image", "videos", "audios")  # columns that belong to marks in the text, such as "<image>"
UNWANTED = ("label", "kto_tag")  # false in data for KTO: an answer to avoid
Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """A conversation. messages: dicts in the format of the tokenizer's chat template, each with role and content.

    train: for each message, whether it may be a target. The encoder decides which of those are; by default only the
    assistant's messages. tools: JSON schemas of what the assistant may call.
    """

    messages: list[dict[str, Any]]
    train: list[bool]
    tools: Tools | None = None

    def __add__(self, more: "Chat") -> "Chat":
        return Chat(self.messages + more.messages, self.train + more.train, self.tools or more.tools)

    @property
    def is_empty(self) -> bool:
        """Whether it has answers, and all of them are empty."""
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return bool(answers) and all(map(is_empty, answers))


def is_empty(answer: Mapping[str, Any]) -> bool:
    """Whether an assistant's message has neither text nor tool calls, as exports of failed generations have."""
    return not answer["content"].strip() and not answer.get("tool_calls")


def check_conversation(chat: Chat, where: str) -> None:
    """Raises UserError for a system message that is not the first."""
    systems = [i for i, message in enumerate(chat.messages) if message["role"] == "system"]
    if len(systems) > 1:
        raise UserError(
            f"{where}: {len(systems)} system messages (a field 'system' is one); a conversation has at most one, at "
            "its start"
        )
    if systems and systems[0] != 0:
        raise UserError(f"{where}: the system message is number {systems[0] + 1}; it must be the first")


def without_filled_nulls(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a table without the nulls inside its structs, which stand for keys that the record did not have.

    In Parquet and Arrow all values of a column share one struct type, so each has the keys of all others.
    """
    return _without_nulls(record) if isinstance(record, TableRow) else record


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def tools(record: Mapping[str, Any], where: str) -> Tools | None:
    """The record's tools: a list of JSON schemas, or its JSON text, or a list of such texts."""
    given = record.get("tools")
    if isinstance(given, str):
        given = parse_json(given, f"{where}: tools") if given.strip() else None
    if isinstance(given, list):
        given = [
            parse_json(tool, f"{where}: tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(given)
        ]
    return checked_tools(given, f"{where}: tools")


def messages(record: Mapping[str, Any], field: str, where: str) -> Chat:
    """The conversation in a list of messages."""
    return _each(record, field, where, "role and content", lambda given, at: given)


def turns(record: Mapping[str, Any], field: str, where: str) -> Chat:
    """The conversation in a list of ShareGPT turns."""
    return _each(record, field, where, "from and value", _message_of_turn)


def _each(
    record: Mapping[str, Any], field: str, where: str, keys: str, message_of: Callable[[dict[str, Any], str], Mapping]
) -> Chat:
    """The conversation in the field's list. keys: what each entry must have; message_of: makes a message of it."""
    chat = Chat([], [])
    for i, given in enumerate(listed(record, field, where)):
        at = f"{where}: {field}[{i}]"
        if not isinstance(given, dict):
            raise UserError(f"{at} is {validate.short(given)}; it must be an object with {keys}")
        without_flags = {key: value for key, value in given.items() if key not in FLAGS}
        message = checked_message(message_of(without_flags, at), at)
        chat.messages.append(message)
        chat.train.append(
            _flag(given, message["role"], at) and not (message["role"] == "assistant" and is_empty(message))
        )
    return chat


def _message_of_turn(turn: dict[str, Any], at: str) -> dict[str, Any]:
    validate.choice(f"{at} from", turn.get("from"), SHAREGPT_ROLES)
    message = {"role": SHAREGPT_ROLES[turn["from"]], "content": text(turn, "value", at)}
    if turn["from"] != "function_call":
        return message
    calls = parse_json(message["content"], f"{at} value")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise UserError(
            f"{at} value is {validate.short(message['content'])}; of a function_call it must be a JSON object "
            "with name and arguments, or a list of them"
        )
    return message | {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def side(record: Mapping[str, Any], field: str, role: str, where: str) -> Chat:
    """The conversation in a list of messages, or a string as one message of this role."""
    if isinstance(record.get(field), list):
        return messages(record, field, where)
    return said(role, text(record, field, where, "text or a list of messages"))


def said(role: str, content: str) -> Chat:
    """One message. An answer without text is context and not trained: a model would learn empty answers."""
    message = {"role": role, "content": content}
    return Chat([message], [role != "assistant" or not is_empty(message)])


def question(record: Mapping[str, Any], where: str) -> Chat:
    """The prompt of an Alpaca record: history and instruction."""
    chat = Chat([], [])
    history = record.get("history")
    if history is not None and not isinstance(history, list):
        raise UserError(f"{where}: history is {validate.short(history)}; it must be a list of [question, answer] pairs")
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{where}: history[{i}] is {validate.short(pair)}; it must be a pair [question, answer]")
        asked, answer = (validate.unicode_text(part, f"{where}: history[{i}]") for part in pair)
        chat += said("user", asked) + said("assistant", answer)
    parts = [text(record, "instruction", where)]
    if record.get("input") is not None:
        parts.append(text(record, "input", where))
    return chat + said("user", "\n".join(filter(None, parts)))


def opening(record: Mapping[str, Any], where: str) -> Chat:
    """The fields `system` and `tools`, of any format: a conversation's system message, unless empty, and its tools."""
    for field in NOT_TEXT:
        if record.get(field) not in (None, [], ""):
            raise UserError(
                f"{where}: {field} is {validate.short(record[field])}; supported: text only; leave the record out"
            )
    for field in UNWANTED:
        if record.get(field) is False:
            raise UserError(f"{where}: {field} is false, so its answer is not wanted; leave the record out")
    chat = Chat([], [], tools(record, where))
    if record.get("system") in (None, ""):
        return chat
    return chat + said("system", text(record, "system", where))


def _flag(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether the message may be trained, by the keys of FLAGS. Absent: yes."""
    given = [(key, message[key]) for key in FLAGS if message.get(key) is not None]
    for key, value in given:
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where} {key} is {validate.short(value)}; it must be {FLAGS[key]}")
        if value and role != "assistant":
            raise UserError(
                f"{where} {key} is {validate.short(value)} but role is {role!r}; only an assistant's message is trained"
            )
    return all(value for _, value in given)


def listed(record: Mapping[str, Any], field: str, where: str, of: str = "message") -> Sequence[Any]:
    """The field's list, which must not be empty."""
    value = record.get(field)
    if value is None:
        raise UserError(f"{where}: no {field}; the record has the fields {fields(record)}")
    if not isinstance(value, list):
        raise UserError(f"{where}: {field} is {validate.short(value)}; it must be a list of {of}s")
    if not value:
        raise UserError(f"{where}: {field} is empty; give at least one {of}")
    return value


def text(record: Mapping[str, Any], field: str, where: str, kind: str = "text") -> str:
    """The field's text."""
    separator = " " if where.endswith("]") else ": "
    value = record.get(field)
    if value is None:
        raise UserError(f"{where}{separator}no {field}; it must be {kind}, and the fields are {fields(record)}")
    if not isinstance(value, str):
        raise UserError(f"{where}{separator}{field} is {validate.short(value)}; it must be {kind}")
    return validate.unicode_text(value, f"{where}{separator}{field}")


def fields(record: Mapping[str, Any]) -> str:
    """The names of the record's fields, for messages."""
    return ", ".join(map(validate.short, itertools.islice(record, 20))) + ", ..." * (len(record) > 20) or "(none)"
