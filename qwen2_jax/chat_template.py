# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a checkpoint's Jinja source turns a conversation into text, in a sandbox with bounds.

The result is byte for byte what transformers' apply_chat_template gives for the same messages; no code from a
checkpoint runs. A template that leaves tools, tool calls or their results out of the text is an error.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError

MAX_SOURCE = 1 << 20  # characters of a template; released ones have up to 20,000

# Qwen2's template, for folders that have its special tokens and no template of their own.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """One or several named templates with the special tokens that they may write.

    Messages are those that `conversation.checked_messages` returns, and tools those of `tool_schema.checked_tools`.
    """

    def __init__(self, named: Mapping[str, str], tokens: Mapping[str, Any]):
        """named: sources by name; "default" is used, or "tool_use" where tools are given. tokens: by their names."""
        self.named = dict(named)
        self.tokens = dict(tokens)

    @property
    def default(self) -> str | None:
        """The source that is used without tools."""
        return self.named.get("default")

    def source(self, tools: Any = None) -> str:
        """The source for a conversation with these tools. Raises UserError where there is none, or no default."""
        for name in ("tool_use",) * bool(tools) + ("default",):
            if name in self.named:
                return self.named[name]
        if not self.named:
            raise UserError("this checkpoint has no chat template and no <|im_start|> token; give a plain prompt")
        names = ", ".join(map(repr, sorted(self.named)[:10]))
        raise UserError(
            f"this checkpoint has the chat templates {names} and none is 'default'; "
            "name one of them so in its tokenizer_config.json, or write it to chat_template.jinja"
        )

    def render(self, messages: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises UserError where the template fails, whatever it raises."""
        source = self.source(tools)
        form = _tool_call_form(source, tuple(sorted(self._texts()))) if _has_calls(messages) else None
        return _rendered(source, form(messages) if form else messages, tools, add_generation_prompt, self.tokens)

    def writes(self, key: str) -> bool:
        """Whether the last answer's text under this key, such as "reasoning_content", becomes part of the text."""
        return _writes(self.source(), key, tuple(sorted(self._texts())))

    def check_nothing_left_out(self, messages: Messages, tools: Sequence[Any] | None) -> None:
        """Raises UserError naming the first tool, tool call or tool result that is not part of the text.

        Each gets a unique mark, and the text is searched for the marks.
        """
        if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            return
        marks = _Marks(messages, tools)
        marked_tools = None if tools is None else [marks.tool(i, tool) for i, tool in enumerate(tools)]
        marked = [marks.message(i, message) for i, message in enumerate(messages)]
        text = self.render(marked, marked_tools, add_generation_prompt=False)
        for mark, what in marks.what.items():
            if mark not in text:
                raise UserError(
                    f"{what}, which this tokenizer's chat template leaves out; write it into a message's content, or "
                    "use a tokenizer whose template has it"
                )

    def _texts(self) -> list[tuple[str, str]]:
        return [(name, token) for name, token in self.tokens.items() if isinstance(token, str)]


def _rendered(
    source: str, messages: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool, tokens: Mapping[str, Any]
) -> str:
    from qwen2_jax.template_sandbox import bounds

    given = {"messages": list(messages), "tools": tools, "documents": None}
    sizes: list[int] = []
    map_text([given["messages"], tools], lambda text: sizes.append(len(text)))
    try:
        with bounds(sum(sizes) + len(sizes)):
            return _compiled(source).render(**tokens, **given, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # the template's author decides what is raised, SyntaxError and RecursionError included
        raise UserError(f"the checkpoint's chat template failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].encode(errors="backslashreplace").decode()


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    """The Jinja template under the settings and extra names that chat templates are written for."""
    import jinja2.ext

    from qwen2_jax.template_sandbox import Sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for loss masks; the text is the same."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    if len(source) > MAX_SOURCE:
        raise ValueError(f"it has {len(source):,} characters; at most {MAX_SOURCE:,} are read")
    extensions: list[Any] = [Generation, jinja2.ext.loopcontrols]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.add_filter("tojson", tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


# Tool calls


class _Form:
    """How a template wants an assistant's tool calls: arguments as an object or as JSON text, empty content or None."""

    def __init__(self, as_text: bool, empty: str | None):
        self.as_text, self.empty = as_text, empty

    def __call__(self, messages: Messages) -> list[Mapping[str, Any]]:
        return [self._message(message) if message.get("tool_calls") else message for message in messages]

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        calls = [self._call(call) for call in message["tool_calls"]] if self.as_text else message["tool_calls"]
        return {**message, "tool_calls": calls, "content": message["content"] or self.empty}

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        if "function" in call:
            return {**call, "function": self._call(call["function"])}
        if "arguments" not in call:
            return call
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


@functools.lru_cache(maxsize=32)
def _tool_call_form(source: str, tokens: tuple[tuple[str, str], ...]) -> _Form:
    """The first form of which the template writes name and arguments, found by rendering one call in each.

    Most templates, Qwen2.5's among them, write arguments as JSON; some of DeepSeek's want JSON text, and None as
    content. Where no form works, the first one's error or omission is reported when a conversation is rendered.
    """
    function = {"name": "q7name", "arguments": {"q7key": "q7value"}}
    call = {"id": "q7id000000", "type": "function", "function": function}
    asked = {"role": "user", "content": "q7question"}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    forms = [_Form(as_text, empty) for as_text in (False, True) for empty in ("", None)]
    for form in forms:
        try:
            text = _rendered(source, form([asked, answer]), None, False, dict(tokens))
        except UserError:
            continue
        if all(word in text for word in ("q7name", "q7key", "q7value")):
            return form
    return forms[0]


@functools.lru_cache(maxsize=32)
def _writes(source: str, key: str, tokens: tuple[tuple[str, str], ...]) -> bool:
    chat = [{"role": "user", "content": "q7question"}, {"role": "assistant", "content": "q7answer", key: "q7words"}]
    return "q7words" in _rendered(source, chat, None, False, dict(tokens))


def _has_calls(messages: Messages) -> bool:
    return any(message.get("tool_calls") for message in messages)


class _Marks:
    """Copies of messages and tools that carry marks. what: for each mark, what carries it."""

    def __init__(self, messages: Messages, tools: Sequence[Any] | None):
        found: list[str] = []
        map_text([list(messages), list(tools or [])], found.append)
        self._salt = next(salt for n in range(1 << 30) if not any((salt := f"q{n}q") in text for text in found))
        self.what: dict[str, str] = {}

    def _mark(self, text: str, what: str) -> str:
        mark = f"{self._salt}{len(self.what)}q"
        self.what[mark] = what
        return text + mark

    def message(self, i: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] == "tool":
            return {**message, "content": self._mark(message["content"], f"messages[{i}] is a tool's result")}
        if not message.get("tool_calls"):
            return message
        what = f"messages[{i}] has tool_calls"
        return {**message, "tool_calls": [self._named(call, what) for call in message["tool_calls"]]}

    def tool(self, i: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        name = (tool["function"] if isinstance(tool.get("function"), Mapping) else tool)["name"]
        return self._named(tool, f"tools[{i}] is {validate.short(name)}")

    def _named(self, call: Mapping[str, Any], what: str) -> Mapping[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._named(call["function"], what)}
        return {**call, "name": self._mark(call["name"], what)}


def map_text(value: Any, change: Callable[[str], Any]) -> Any:
    """A copy of nested lists and dicts with every text changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_text(key, change): map_text(entry, change) for key, entry in value.items()}
    return [map_text(entry, change) for entry in value] if isinstance(value, list | tuple) else value
