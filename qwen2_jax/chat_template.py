# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a checkpoint's Jinja source turns a conversation into text, in a sandbox.

The result is byte for byte what transformers' apply_chat_template gives; no code from a checkpoint runs.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

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


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tokens: Mapping[str, Any],
    tools: Sequence[Any] | None = None,
) -> str:
    """The conversation as text. source: the template; tokens: special tokens by the names that templates use.

    Raises UserError where the template fails.
    """
    import jinja2

    try:
        return _compiled(source).render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's chat template failed: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    """The Jinja template under the settings and extra names that chat templates are written for."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

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

    extensions: list[Any] = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def check_messages(messages: Any) -> None:
    """Raises UserError naming the message at fault."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages is {validate.short(messages)}; it must be a list of dicts with role and content")
    if not messages:
        raise UserError("messages is empty; give at least one message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {validate.short(message)}; it must be a dict with role and content")
        validate.choice(f"{where} role", message.get("role"), ROLES)
        if "content" not in message:
            raise UserError(f"{where} has no content; give the text of the message")
        if not isinstance(message["content"], str):
            raise UserError(f"{where} content is {validate.short(message['content'])}; it must be text")


def map_text(value: Any, change: Callable[[str], Any]) -> Any:
    """A copy of nested lists and dicts with every text changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_text(key, change): map_text(entry, change) for key, entry in value.items()}
    return [map_text(entry, change) for entry in value] if isinstance(value, list | tuple) else value
