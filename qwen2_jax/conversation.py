# SPDX-License-Identifier: Apache-2.0
"""Checks the messages of a conversation and converts the formats of clients and exports to one.

Training, chat and batch files use it, so that a prompt is rendered as in training:

    content     text; a list of parts {"type": "text", "text": ...} is joined; null beside tool calls counts as ""
    tool_calls  a list of {"type": "function", "function": {"name", "arguments"}} or {"name", "arguments"}; arguments
                are an object, or its JSON text as the OpenAI API has it. Its older `function_call` is one call
    role        "developer" is "system", "function" is "tool"

A key that is null counts as absent. where: what the errors begin with, such as "messages[1]" or, of a record in a
file, "chats.jsonl line 7: messages[1]".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import check_value, parse_json

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system", "function": "tool"}
TEXTS = 'text, or a list of parts like {"type": "text", "text": "..."}'


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages in one form; those given are not changed. Raises UserError naming the message at fault."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages is {validate.short(messages)}; it must be a list of dicts with role and content")
    if not messages:
        raise UserError("messages is empty; give at least one message")
    return [checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_message(given: Any, where: str) -> dict[str, Any]:
    """One message in that form."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {validate.short(given)}; it must be an object with role and content")
    for key, value in given.items():
        if not (isinstance(value, str | None) and (value or "").isascii()):  # nearly all are, and it is done for each
            check_depth(value, f"{where} {validate.short(key) if key != 'content' else key}")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    validate.choice(f"{where} role", role, (*ROLES, *OTHER_NAMES))
    message["role"] = OTHER_NAMES.get(str(role), role)
    if isinstance(message.get("function_call"), Mapping) and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    calls = checked_calls(message.pop("tool_calls", []), where)
    if calls and message["role"] != "assistant":
        raise UserError(f"{where} has tool_calls and the role {role!r}; only the assistant calls tools")
    if calls:
        message["tool_calls"] = calls
        if message.get("content") in (None, []):
            message["content"] = ""
    message["content"] = _content(message, given, where)
    return message


def _content(message: Mapping[str, Any], given: Mapping[str, Any], where: str) -> str:
    if "content" not in message:
        if "content" in given:
            raise UserError(f"{where} content is None; it must be {TEXTS}, and null only beside tool_calls")
        raise UserError(
            f"{where} no content; it must be {TEXTS}, and the fields are {', '.join(map(validate.short, given))}"
        )
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content or not all(isinstance(part, Mapping) for part in content):
        raise UserError(f"{where} content is {validate.short(content)}; it must be {TEXTS}")
    for i, part in enumerate(content):
        if part.get("type") not in ("text", None):
            raise UserError(f"{where} content[{i}] has the type {validate.short(part['type'])}; supported: 'text'")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} content[{i}] text is {validate.short(part.get('text'))}; it must be text")
    return "".join(part["text"] for part in content)


def checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects: templates write them as JSON, and would quote text twice."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where} tool_calls is {validate.short(calls)}; it must be a list of objects")
    return [_call(call, f"{where} tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _function(call["function"], where)}
    return _function({key: value for key, value in call.items() if key != "function"}, where)


def _function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"{where} has no name; it must be like {{'name': ..., 'arguments': {{...}}}}")
    if "arguments" not in function:
        return dict(function)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where} arguments") if arguments.strip() else {}
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where} arguments is {validate.short(arguments)}; it must be an object or its JSON text")
    return {**function, "arguments": dict(arguments)}


def check_depth(value: Any, where: str) -> None:
    """Raises UserError for a value that is nested too deep, or has a string that is no Unicode text."""
    try:
        check_value(value)
    except ValueError as why:
        reason = (
            f"not valid Unicode ({why.reason}, character {why.start + 1})"
            if isinstance(why, UnicodeEncodeError)
            else why
        )
        raise UserError(f"{where} is {reason}") from None
