# SPDX-License-Identifier: Apache-2.0
"""Conversations as clients send them, with tools: one form for chat and training, rendered as transformers does."""

import enum
import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import pytest

import qwen2_jax.demo
from qwen2_jax import template_sandbox
from qwen2_jax.conversation import checked_messages
from qwen2_jax.data.formats.record_formats import read
from qwen2_jax.data.sources.records import open_records
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import IM_END, IM_START, Tokenizer
from qwen2_jax.tool_schema import function_schema

REPORTS = Path(__file__).parents[2] / "shared" / "data" / "reports"
DEMO = Path(qwen2_jax.demo.__file__).parent

# As in the released Qwen2.5 instruct models.
QWEN25 = (Path(__file__).parent / "qwen2_5_chat_template.jinja").read_text()
# Wants what some templates of DeepSeek want: null as the content of a message with calls, and arguments as JSON text.
WITH_TEXT = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
)


class Unit(enum.Enum):
    METRIC = "metric"
    OTHER = "other"


def weather(place: str, days: int = 1, unit: Unit = Unit.METRIC) -> dict[str, Any]:
    """Tells the weather.

    Which may be wrong.

    Args:
        place: Town, or "town, country"
            as people write it.
        days: How many days: at most 7
        unit: Of temperatures

    Returns:
        Temperature and wind.
    """


def everything(
    a: list[int], b: str | None, c: int | float | None, d: Literal["x", 2], e: dict[str, list[bool]],
    f: tuple[int, str], g: Any, h: list, i: list[int] | str, j: str,
):  # fmt: skip
    """Does it.

    Args:
        a: A é <|im_end|>
        b: B
        c: C
        d: D
        e: E
        f: F

        g: G
        h: H
        i: I
        j: J (choices: ["p ", "q"])
    """


def nothing() -> None:
    "Does nothing."


class Kit:
    def method(self, x: float = 0.5) -> Unit:
        """Halves.

        Args:
            x: A number
        Returns:
            Half of it
        Raises:
            ValueError: never
        """


FUNCTIONS = [weather, everything, nothing, Kit().method, Kit.method]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Ulm", "days": None}}},
    {"type": "function", "function": {"name": "nothing", "arguments": {}}},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Ulm <|im_end|>?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 12}'},
    {"role": "tool", "content": "null"},
    {"role": "assistant", "content": "12 degrees."},
    {"role": "user", "content": "And tomorrow?"},
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def with_template(demo: Tokenizer, template: Any) -> Tokenizer:
    return Tokenizer(demo._backend, {"chat_template": template, "eos_token": IM_END})


@pytest.fixture(scope="module")
def qwen25(demo) -> Tokenizer:
    return with_template(demo, QWEN25)


def report(name: str) -> Path:
    if not (REPORTS / name).exists():
        pytest.skip(f"{REPORTS / name} is not here")
    return REPORTS / name


# Tools


@pytest.mark.parametrize("function", FUNCTIONS)
def test_schemas_of_functions_equal_those_of_transformers(function):
    from transformers.utils import get_json_schema

    assert json.dumps(function_schema(function)) == json.dumps(get_json_schema(function))


@pytest.mark.parametrize("tools", [None, [weather], [*FUNCTIONS, {"type": "function", "function": {"name": "f"}}]])
@pytest.mark.parametrize("prompt", [True, False])
def test_tools_are_rendered_as_transformers_renders_them(qwen25, tools, prompt):
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=qwen25._backend, chat_template=QWEN25)
    for messages in (CHAT, CHAT[1:], CHAT[:2]):
        want = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        assert qwen25.render_chat(messages, add_generation_prompt=prompt, tools=tools) == want
        ids = qwen25.chat_ids(messages, add_generation_prompt=prompt, tools=tools)
        assert qwen25.decode(ids, skip_special_tokens=False) == want
        ends = qwen25.token_id(IM_END)
        assert ids.count(ends) == want.count(IM_END) - want.count("Ulm <|im_end|>") - want.count("é <|im_end|>")


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("f", ["tools is 'f'", "list"]),
        ([3], ["tools[0] is 3", "function"]),
        ([{"type": "function"}], ["tools[0] has no name"]),
        ([lambda x: x], ["<lambda> has no docstring"]),
        ([{"name": "f", "x": float}], ["chat template failed", "JSON"]),
    ],
)
def test_tools_that_cannot_be_used_are_named(qwen25, tools, words):
    with pytest.raises(UserError) as error:
        qwen25.chat_ids(CHAT, tools=tools)
    assert all(word in str(error.value) for word in words), error.value


def test_functions_without_a_schema_are_named():
    def bare(x):
        "Does it."

    def undescribed(x: int):
        "Does it."

    def own(x: Tokenizer):
        """Does it.

        Args:
            x: X
        """

    for function, words in (
        (bare, "x .*no type hint"),
        (undescribed, "x .*not described"),
        (own, "Tokenizer.*no JSON"),
    ):
        with pytest.raises(UserError, match=words):
            function_schema(function)


def test_what_a_template_leaves_out_is_named(demo, qwen25):
    for messages, tools, words in (
        (CHAT[:2], [weather], r"tools\[0\] is 'weather'"),
        (CHAT[:3], None, r"messages\[2\] has tool_calls"),
    ):
        with pytest.raises(UserError, match=f"{words}, which .* chat template leaves out"):
            demo.render_chat(messages, tools=tools)
    no_results = with_template(demo, QWEN25.replace("        {{- message.content }}\n", ""))
    with pytest.raises(UserError, match=r"messages\[3\] is a tool's result"):
        no_results.chat_ids(CHAT)
    own = with_template(demo, {"default": demo.chat_template, "tool_use": QWEN25})
    assert own.render_chat(CHAT, tools=[weather]) == qwen25.render_chat(CHAT, tools=[weather])
    assert own.render_chat(CHAT[:2]) == demo.render_chat(CHAT[:2])


# What clients send


@pytest.mark.parametrize("file", ["null_content.json", "empty_content.json"])
def test_tool_calls_of_the_openai_api(demo, file):
    folder = report("chat-tool-calls")
    messages, want = (json.loads((folder / name).read_text()) for name in (file, "expected.json"))
    assert Tokenizer.from_folder(folder).render_chat(messages) == want["rendered"]
    with pytest.raises(UserError, match=r"messages\[1\] has tool_calls, which .* leaves out"):
        demo.render_chat(messages)


def test_a_template_that_wants_arguments_as_text(demo):
    tokenizer = with_template(demo, WITH_TEXT)
    want = '<user>Hi<call>f {"x": "é"}</call>'
    for arguments in ({"x": "é"}, '{"x":"é"}'):
        for content in ("", None):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            answer = {"role": "assistant", "content": content, "tool_calls": [call]}
            assert tokenizer.render_chat([{"role": "user", "content": "Hi"}, answer]) == want
    with pytest.raises(
        UserError, match=r"messages\[1\] has tool_calls"
    ):  # content beside calls: the template writes one
        tokenizer.render_chat([{"role": "user", "content": "Hi"}, answer | {"content": "So."}])


def test_other_spellings_become_one_form():
    function = {"name": "f", "arguments": {"x": 1}}
    given = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
            "name": None,
        },
        {"role": "user", "content": ({"text": "Hi"},)},
        {"role": "assistant", "content": None, "function_call": function | {"arguments": ' {"x": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}, "id": "7"}], "refusal": None},
    ]
    before = repr(given)
    want = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "f", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}, "id": "7"}]},
    ]
    assert checked_messages(given) == checked_messages(want) == want
    assert repr(given) == before


def test_deep_nesting_is_an_error(demo):
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match=r"messages\[0\] 'extra' is nested more than"):
        demo.chat_ids([{"role": "user", "content": "x", "extra": deep}])
    with pytest.raises(UserError, match=r"tools\[0\] is nested more than"):
        demo.chat_ids([{"role": "user", "content": "x"}], tools=[{"name": "f", "x": deep}])


# The same in training


def encoded(tokenizer: Tokenizer, file: Path, cache: Path):
    records = open_records(str(file), cache)
    documents = [read(records[i], "auto", records.where(i)) for i in range(len(records))]
    return [(one.tokens, one.is_target) for one in Encoder(tokenizer).encode_batch(documents)]


def test_function_calls_of_sharegpt_are_tool_calls(tmp_path):
    folder, tokenizer = report("sharegpt-function-call"), Tokenizer.from_folder(report("chat-tool-calls"))
    (one,), (other,) = (encoded(tokenizer, folder / f"{name}.jsonl", tmp_path) for name in ("messages", "sharegpt"))
    assert one == other
    assert "<tool_call>" in tokenizer.decode(t for t, is_target in zip(*other, strict=True) if is_target)


def test_a_system_message_in_a_field_of_its_own(demo, tmp_path):
    folder = report("system-column")
    start = f"{IM_START}system\nAnswer in one word.{IM_END}\n{IM_START}user\nWhich is larger, 3 or 8?{IM_END}\n"
    for file in sorted(folder.glob("*.jsonl")):
        ((tokens, _),) = encoded(demo, file, tmp_path)
        text = demo.decode(tokens, skip_special_tokens=False)
        assert text.startswith(start) and text.count("system") == text.count("which is the larger") + text.count(start)


def test_nulls_that_parquet_fills_in_are_absent(tmp_path):
    folder, tokenizer = report("tool-arguments-null"), Tokenizer.from_folder(report("chat-tool-calls"))
    want = json.loads((folder / "expected.json").read_text())["rendered_calls"]
    lines, rows = (encoded(tokenizer, folder / name, tmp_path) for name in ("calls.jsonl", "calls.parquet"))
    assert lines == rows
    for (tokens, _), call in zip(rows, want, strict=True):
        assert call in tokenizer.decode(tokens, skip_special_tokens=False)
    with_null = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    (tmp_path / "null.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, with_null]}))
    ((tokens, _),) = encoded(tokenizer, tmp_path / "null.jsonl", tmp_path)
    assert '{"x": null}' in tokenizer.decode(tokens)  # somebody wrote it


@pytest.mark.parametrize("form", [list, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_a_column_of_tools_is_trained_as_it_is_asked(qwen25, form):
    tools = [function_schema(weather), function_schema(nothing)]
    document = read({"messages": CHAT[:-1], "tools": form(tools)}, "auto", "here")
    tokens = Encoder(qwen25).encode(document)
    assert tokens.tokens == qwen25.chat_ids(CHAT[:-1], add_generation_prompt=False, tools=[weather, nothing])
    runs = "".join(
        qwen25.decode([token], False) if is_target else "\0"
        for token, is_target in zip(tokens.tokens, tokens.is_target, strict=True)
    )
    calls = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm", "days": null}}\n</tool_call>'
    calls += '\n<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'
    assert [run for run in runs.split("\0") if run] == [f"{calls}{IM_END}", f"12 degrees.{IM_END}"]


# Templates


def test_several_templates_by_name(demo):
    folder = report("named-templates")
    messages = [{"role": "user", "content": "Hi"}]
    assert Tokenizer.from_folder(folder / "dict").render_chat(messages) == "<user>Hi<answer>"
    none = Tokenizer.from_folder(folder / "no-default")
    assert none.chat_template is None
    with pytest.raises(UserError, match=r"chat templates 'rag' and none is 'default'"):
        none.chat_ids(messages)


def test_additional_chat_templates(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat(CHAT[:2], tools=[{"name": "f"}]) == '[{"name": "f"}]'
    with pytest.raises(UserError, match="'tool_use' and none is 'default'"):
        tokenizer.render_chat(CHAT[:2])
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(tmp_path).render_chat(CHAT[:2]) == "file"


@pytest.mark.parametrize("template", [
    "{% break %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for i in range(99999) if range(99999) | sum == 3 %}{% endfor %}",
    "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "{% set x = {} %}" + "{% set x = dict(a=x, b=x) %}" * 40 + "{{ x | tojson }}",
    "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}", "{{ 'x' * 10 ** 10 }}", "{{ 7 ** (7 ** 7) }}",
    "{{ 'x'.center(10 ** 9) }}", "{{ 'x' | center(10 ** 9) }}", "{{ '%0999999999d' % 1 }}",
    "{{ '{:{}}'.format(1, '999999999') }}", "{{ 'x\n' * 99999 | indent(99999) }}",
    "{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}", "(" * 5000 + "{{" + "(" * 5000,
])  # fmt: skip
def test_rendering_is_bounded_and_every_failure_is_an_error(demo, template, monkeypatch):
    assert template_sandbox.SECONDS <= 2
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    began = time.thread_time()
    with pytest.raises(UserError, match="^the checkpoint's chat template failed: ") as error:
        with_template(demo, template).render_chat(CHAT[:2])
    assert time.thread_time() - began < 2 and "\n" not in str(error.value)


def test_bounds_leave_ordinary_templates_alone(demo):
    template = (
        "{{ '%s %5d' % ('a', 5) }}|{{ '{} {:>5}'.format('1234567', 2) }}|{{ ['a', 'b'] | join(', ') }}"
        "|{{ {'a': (1, [2])} }}"
        "|{{ 'a' ~ 3 ~ none }}|{% for a, b in {'x': 1}.items() %}{{ a, b }}{% endfor %}|{{ messages | length }}"
        "|{% for x in [1, 2] recursive %}{{ loop.index }}{{ loop([5]) if x == 1 }}{% endfor %}|{{ 2 ** 10 + 7 % 4 }}"
        "|{{ 'x' * 3 + 'y' }}|{{ [1] + [2] }}|{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    )
    want = "a     5|1234567     2|a, b|{'a': (1, [2])}|a3None|('x', 1)|2|112|1027|xxxy|[1, 2]|2"
    assert with_template(demo, template).render_chat(CHAT[:2]) == want
    long = [{"role": "user", "content": "x" * 5_000_000}]
    assert len(demo.render_chat(long)) > 5_000_000
