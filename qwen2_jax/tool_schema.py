# SPDX-License-Identifier: Apache-2.0
"""Tools that a model may call, as the JSON schemas that chat templates write into the prompt.

A tool is a schema as the OpenAI API has it, {"type": "function", "function": {"name", "description", "parameters"}},
which the template gets as it is; or a Python function with type hints and a Google-style docstring, of which the
schema is made. The result is equal to that of transformers.utils.get_json_schema, order of keys included.
"""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from qwen2_jax import validate
from qwen2_jax.conversation import check_depth
from qwen2_jax.errors import UserError

SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
CONTAINERS = {list: "array", tuple: "array", dict: "object"}
SECTION = re.compile(r"^[ \t]*(Args|Returns|Raises):[ \t]*", re.MULTILINE)
ARGUMENT = re.compile(r"([ \t]*)(\w+):\s*(.*)", re.DOTALL)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def checked_tools(tools: Any, where: str = "tools") -> list[dict[str, Any]] | None:
    """The tools' schemas; None where there are none. Raises UserError naming the tool at fault."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise UserError(f"{where} is {validate.short(tools)}; it must be a list of schemas or Python functions")
    return [_schema(tool, f"{where}[{i}]") for i, tool in enumerate(tools)] or None


def _schema(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        check_depth(tool, where)
        function = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(
                f"{where} has no name; it must be like {{'type': 'function', 'function': {{'name': ..., "
                "'description': ..., 'parameters': {...}}}"
            )
        return dict(tool)
    if not callable(tool):
        raise UserError(f"{where} is {validate.short(tool)}; it must be a schema or a Python function")
    return function_schema(tool)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a Python function, of its type hints and docstring.

    Type hints: str, int, float, bool, Any, list, tuple, dict, their unions, Optional, Literal and Enum classes. The
    docstring describes the function, each argument under "Args:", and may have "Returns:"; "(choices: [...])" at the
    end of an argument's description, with a JSON list, becomes its enum.

    Raises:
        UserError: no docstring, an argument without type hint or description, or a type that has no schema.
    """
    name = getattr(function, "__name__", "operation")
    if not (doc := (inspect.getdoc(function) or "").strip()):
        raise UserError(f"the function {name} has no docstring; it must say what the function and its arguments mean")
    description, arguments, returned = _docstring(doc)
    parameters = inspect.signature(function).parameters
    first = next(iter(parameters.values()), None)
    skipped = first.name if first and first.name in ("self", "cls") and first.annotation is first.empty else None
    for parameter in parameters.values():
        if parameter.annotation is parameter.empty and parameter.name != skipped:
            raise UserError(f"argument {parameter.name} of the function {name} has no type hint; give it one")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # hints may be text, which is evaluated as the function's author wrote it
        raise UserError(f"the type hints of the function {name} cannot be read: {error}") from error
    result, properties = hints.pop("return", inspect.Parameter.empty), {}
    for argument, hint in hints.items():
        if argument == skipped:
            continue
        if argument not in arguments:
            raise UserError(f"argument {argument} of the function {name} is not described under Args: in its docstring")
        properties[argument] = _described(_of_type(hint, f"argument {argument} of {name}"), arguments[argument], name)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [p.name for p in parameters.values() if p.default is p.empty and p.name != skipped]
    if required:
        schema["required"] = required
    made: dict[str, Any] = {"name": name, "description": description, "parameters": schema}
    if result is not inspect.Parameter.empty:
        try:
            made["return"] = _of_type(result, "")
        except UserError:  # the model never writes it, so a type without a schema is left out
            pass
        else:
            if returned is not None:
                made["return"]["description"] = returned
    return {"type": "function", "function": made}


def _described(schema: dict[str, Any], text: str, name: str) -> dict[str, Any]:
    if choices := CHOICES.search(text):
        try:
            values = json.loads(choices[1])
        except ValueError as error:
            raise UserError(f"the choices of {name} are {choices[1]}; they must be a JSON list ({error})") from None
        schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
        text = text[: choices.start()].strip()
    return schema | {"description": text}


def _of_type(hint: Any, where: str) -> dict[str, Any]:
    """The schema of a type hint."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _of_union(given, where)
    if origin is Literal:
        return _of_values(list(given), where)
    if origin is None and isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _of_values([member.value for member in hint], where)
    if hint is Any:
        return {}
    bare = hint if origin is None else origin
    if not given and bare in SCALARS | CONTAINERS:
        return {"type": (SCALARS | CONTAINERS)[bare]}
    if origin is list:
        return {"type": "array", "items": _of_type(given[0], where)}
    if origin is tuple and len(given) > 1 and ... not in given:
        return {"type": "array", "prefixItems": [_of_type(each, where) for each in given]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(given[1], where)}
    raise UserError(
        f"{where} has the type {validate.short(hint)}, which has no JSON schema; use str, int, float, bool, list, "
        "dict, unions of them, Literal or an Enum, or give the tool as a schema"
    )


def _of_union(given: Sequence[Any], where: str) -> dict[str, Any]:
    parts = [_of_type(each, where) for each in given if each is not type(None)]
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        names = sorted({part["type"] for part in parts})
        schema = {"type": names if len(names) > 1 else names[0]}
    else:
        schema = {"anyOf": parts}
    return schema | {"nullable": True} if type(None) in given else schema


def _of_values(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise UserError(f"{where} has the values {validate.short(values)}; they must be texts, numbers, bools or None")
    names = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": names if len(names) > 1 else names[0], "enum": values}


def _docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(description, descriptions of the arguments, of the result or None) of a Google-style docstring."""
    found = list(SECTION.finditer(doc))
    description = doc[: found[0].start()] if found else doc
    sections: dict[str, str] = {}
    for heading, following in zip(found, [*found[1:], None], strict=False):
        sections.setdefault(heading[1], doc[heading.end() : following.start() if following else len(doc)])
    lines = [line for line in sections.get("Args", "").split("\n") if line.strip()]
    arguments: list[list[str]] = []
    indent = None
    for line in lines:
        start = ARGUMENT.match(line)
        if start and (indent is None or len(start[1]) <= indent):
            indent = len(start[1])
            arguments.append([start[2], start[3].strip()])
        elif arguments:
            arguments[-1][1] += f" {line.strip()}"
    returned = sections.get("Returns")
    return description.strip(), {name: text.strip() for name, text in arguments}, returned and returned.strip()
