# SPDX-License-Identifier: Apache-2.0
"""Parses conversations from records: message lists, ShareGPT turns, Alpaca questions, plain strings.

Errors name the record's location, the field and the remedy. where: the record's location, for error messages.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_jax import validate
from qwen2_jax.chat_template import ROLES
from qwen2_jax.errors import UserError

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """A conversation. messages: dicts in the format of the tokenizer's chat template, each with role and content.

    train: for each message, whether it may be a target. The encoder decides which of those are; by default only the
    assistant's messages.
    """

    messages: list[dict[str, Any]]
    train: list[bool]

    def __add__(self, more: "Chat") -> "Chat":
        return Chat(self.messages + more.messages, self.train + more.train)


def check_conversation(chat: Chat, where: str) -> None:
    """Raises UserError for a system message that is not the first."""
    systems = [i for i, message in enumerate(chat.messages) if message["role"] == "system"]
    if len(systems) > 1:
        raise UserError(f"{where}: {len(systems)} system messages; a conversation has at most one, at its start")
    if systems and systems[0] != 0:
        raise UserError(f"{where}: the system message is number {systems[0] + 1}; it must be the first")


def refuse_tools(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a record with tool definitions."""
    if record.get("tools") not in (None, [], "", "[]"):
        raise UserError(
            f"{where}: tools are not supported; describe them in the system message and leave the field out"
        )


def messages(record: Mapping[str, Any], field: str, where: str) -> Chat:
    """The conversation in a list of messages."""
    chat = Chat([], [])
    for i, given in enumerate(listed(record, field, where)):
        place = f"{where}: {field}[{i}]"
        _dict(given, place, "role and content")
        validate.choice(f"{place} role", given.get("role"), ROLES)
        message = {key: value for key, value in given.items() if value is not None and key not in ("train", "weight")}
        if message.get("tool_calls"):
            message["tool_calls"] = _tool_calls(message["tool_calls"], place)
            message.setdefault("content", "")
        else:
            message.pop("tool_calls", None)
        message["content"] = text(message, "content", place)
        chat.messages.append(message)
        chat.train.append(_flag(given, message["role"], place))
    return chat


def side(record: Mapping[str, Any], field: str, role: str, where: str) -> Chat:
    """The conversation in a list of messages, or a string as one message of this role."""
    if isinstance(record.get(field), list):
        return messages(record, field, where)
    return Chat([{"role": role, "content": text(record, field, where, "text or a list of messages")}], [True])


def turns(record: Mapping[str, Any], field: str, where: str) -> Chat:
    """The conversation in a list of ShareGPT turns."""
    chat = Chat([], [])
    for i, given in enumerate(listed(record, field, where)):
        place = f"{where}: {field}[{i}]"
        _dict(given, place, "from and value")
        validate.choice(f"{place} from", given.get("from"), SHAREGPT_ROLES)
        role = SHAREGPT_ROLES[given["from"]]
        chat.messages.append({"role": role, "content": text(given, "value", place)})
        chat.train.append(_flag(given, role, place))
    return chat


def question(record: Mapping[str, Any], where: str) -> Chat:
    """The prompt of an Alpaca record: system message, history and instruction."""
    chat = system(record, where)
    history = record.get("history")
    if history is not None and not isinstance(history, list):
        raise UserError(f"{where}: history is {validate.short(history)}; it must be a list of [question, answer] pairs")
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{where}: history[{i}] is {validate.short(pair)}; it must be a pair [question, answer]")
        asked, answer = (_unicode(part, f"{where}: history[{i}]") for part in pair)
        chat += Chat([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], [True] * 2)
    parts = [text(record, "instruction", where)]
    if record.get("input") is not None:
        parts.append(text(record, "input", where))
    return chat + Chat([{"role": "user", "content": "\n".join(filter(None, parts))}], [True])


def system(record: Mapping[str, Any], where: str) -> Chat:
    """The system message from the record's field `system`; no message if that is empty."""
    if record.get("system") in (None, ""):
        return Chat([], [])
    return Chat([{"role": "system", "content": text(record, "system", where)}], [True])


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects: templates serialize them, and a string would be quoted twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where} tool_calls is {validate.short(calls)}; it must be a list of objects")
    result = []
    for i, call in enumerate(calls):
        nested = isinstance(call.get("function"), dict)
        function = dict(call["function"] if nested else call)
        if not isinstance(function.get("name"), str):
            raise UserError(
                f"{where} tool_calls[{i}] has no name; it must be like {{'name': ..., 'arguments': {{...}}}}"
            )
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise UserError(f"{where} tool_calls[{i}] arguments is not valid JSON ({error})") from error
        result.append(call | {"function": function} if nested else function)
    return result


def _flag(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether the message may be trained: "train": true or false, or OpenAI's "weight": 1 or 0. Absent: yes."""
    given = [(key, message[key]) for key in ("train", "weight") if message.get(key) is not None]
    for key, value in given:
        if value not in (0, 1):  # includes True and False
            raise UserError(
                f"{where} {key} is {validate.short(value)}; it must be "
                f"{'true or false' if key == 'train' else '0 or 1'}"
            )
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


def _dict(value: Any, where: str, fields: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {validate.short(value)}; it must be an object with {fields}")


def text(record: Mapping[str, Any], field: str, where: str, kind: str = "text") -> str:
    """The field's text."""
    separator = " " if where.endswith("]") else ": "
    value = record.get(field)
    if value is None:
        raise UserError(f"{where}{separator}no {field}; it must be {kind}, and the fields are {fields(record)}")
    if not isinstance(value, str):
        raise UserError(f"{where}{separator}{field} is {validate.short(value)}; it must be {kind}")
    return _unicode(value, f"{where}{separator}{field}")


def _unicode(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where} is {validate.short(text)}; it must be text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode ({error.reason}, character {error.start + 1})") from error
    return text


def fields(record: Mapping[str, Any]) -> str:
    """The names of the record's fields, for messages."""
    return ", ".join(map(repr, record)) or "(none)"
