# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files, chat templates and conversations that are damaged or hostile: the right result, or one line."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from mutations import damaged, mutated, mutated_json, right_or_refused
from qwen2_jax import template_sandbox
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.errors import UserError
from qwen2_jax.speedrun import bpe
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer
from test_conversation import CALLS, CHAT, QWEN25, weather
from test_tokenizer import TOOLS_TEMPLATE

REPORTS = Path(__file__).parents[2] / "shared" / "data" / "reports"
SETTINGS = {
    "bos_token": None,
    "eos_token": IM_END,
    "pad_token": {"content": END_OF_TEXT, "special": True, "lstrip": False},
    "additional_special_tokens": [IM_START, IM_END],
    "chat_template": [{"name": "default", "template": TOOLS_TEMPLATE}, {"name": "tool_use", "template": QWEN25}],
    "model_max_length": 32768,
    "added_tokens_decoder": {},
}
TEXT = "Hello 42 wörld <|im_end|> \n\n\u0300"


@pytest.fixture(scope="module")
def small():
    return bpe.train(["Hello world, it is 2024!\n"] * 4, vocab_size=275)


@pytest.fixture
def folder(small, tmp_path):
    small.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def use(tokenizer: Tokenizer) -> None:
    """Everything that a run does with a tokenizer; ids and text must be of the promised types."""
    for ids in (tokenizer.encode(TEXT), tokenizer.encode(TEXT, allow_special=False), tokenizer.chat_ids(CHAT[:2])):
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids, skip_special_tokens=False), str)
    assert all(type(i) is int for i in (*tokenizer.eos_ids, tokenizer.fill_id))
    tokenizer.render_chat(CHAT, tools=[weather])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token": 7}, "eos_token is 7; it must be a text"),
        ({"pad_token": {"content": None}}, "pad_token is {'content': None}; it must be a text"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens is 'x'; it must be a list of texts"),
        ({"chat_template": ["x"]}, r"chat_template is \['x'\]; it must be a template's text"),
        ({"chat_template": {"default": 3}}, "chat_template is {'default': 3}; it must be"),
        ({"chat_template": 1}, "chat_template is 1; it must be"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(folder, settings, words):
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
    with pytest.raises(UserError, match=f"{folder}/tokenizer_config.json: {words}"):
        Tokenizer.from_folder(folder)


def test_files_that_cannot_be_used_are_named(folder):
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON that can be read"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "chat_template.jinja").write_bytes("für".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template.jinja is not valid UTF-8 \(byte 2\)"):
        Tokenizer.from_folder(folder)


def test_a_prefix_of_subwords_is_refused_before_the_library_panics(folder, capfd):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = "##"
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r'tokenizer.json cannot be read as a tokenizer: it has "continuing_subword_prefix'
    ):
        Tokenizer.from_folder(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "Cannot parse precompiled_charsmap"),
        ({"normalizer": {"type": "Prepend", "prepend": ""}}, "index out of bounds"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    ],
    ids=["while it reads", "in a normaliser", "in a pre-tokeniser"],
)
def test_a_panic_of_the_library_is_one_line(folder, capfd, change, words):
    settings = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"tokenizer.json cannot be read as a tokenizer: .*{words}"):
        Tokenizer.from_folder(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_steps_that_double_a_text_are_bounded(folder, part):
    settings = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    inside = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[part]
    if part == "normalizer":
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    settings[part] = {"type": "Sequence", inside: [{"type": "Sequence", inside: [step] * 50}]}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="tokenizer.json: .* can double a text (50|80) times; at most 8"):
        Tokenizer.from_folder(folder)


def test_a_panic_on_one_text_is_one_line(small):
    broken = tokenizers.Tokenizer.from_str(small.to_str())
    broken.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
    with pytest.raises(UserError, match="the tokenizer failed to encode a text: chunk size must be non-zero"):
        Tokenizer(broken).encode("a")


def test_dropout_of_merges_is_refused(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer.json: dropout is 0.5, .*supported: null"):
        Tokenizer.from_folder(folder)


def test_tokens_that_a_post_processor_adds(tmp_path):
    if not REPORTS.exists():
        pytest.skip(f"{REPORTS} is not here")
    tokenizer = Tokenizer.from_folder(REPORTS / "bos-post-processor")
    want = json.loads((REPORTS / "bos-post-processor" / "expected.json").read_text())
    first, *inside = want["prompt_ids"]
    assert tokenizer.encode(want["prompt"]) == want["prompt_ids"]
    assert tokenizer.encode(want["prompt"], add_special_tokens=False) == inside
    ids = tokenizer.chat_ids([{"role": "user", "content": want["prompt"]}])
    assert ids[0] == first and ids.count(first) == 1 and f"{inside}"[1:-1] in f"{ids}"
    from qwen2_jax.data.formats.record_formats import Chat, Text

    document = Encoder(tokenizer).encode(Text(want["prompt"]))
    assert document.tokens == [*want["prompt_ids"], tokenizer.token_id(END_OF_TEXT)]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Encoder(tokenizer).encode(Chat(chat, [True] * 2)).tokens == tokenizer.chat_ids(chat, False)


def test_mutated_settings(folder, mutations):
    def read() -> None:
        use(Tokenizer.from_folder(folder))

    for seed in mutations:
        (folder / "tokenizer_config.json").write_bytes(mutated_json(seed, SETTINGS))
        right_or_refused(seed, read)


def test_mutated_settings_beside_a_vocabulary(folder, small, mutations):
    small.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    added = {str(261 + i): {"content": name, "special": True} for i, name in enumerate([END_OF_TEXT, IM_START, IM_END])}
    vocabulary = json.loads((folder / "vocab.json").read_text())
    added = {str(len(vocabulary) + i): entry for i, entry in enumerate(added.values())}
    good = {"added_tokens_decoder": added, "eos_token": IM_END, "pad_token": END_OF_TEXT, "chat_template": QWEN25}
    (folder / "tokenizer_config.json").write_text(json.dumps(good))
    use(Tokenizer.from_folder(folder))
    for seed in mutations:
        (folder / "tokenizer_config.json").write_bytes(mutated_json(seed, good))
        right_or_refused(seed, lambda: use(Tokenizer.from_folder(folder)))


def test_mutated_tokenizers(folder, mutations):
    good = json.loads((folder / "tokenizer.json").read_text())
    for seed in mutations:
        (folder / "tokenizer.json").write_bytes(mutated_json(seed, good))
        right_or_refused(seed, lambda: use(Tokenizer.from_folder(folder)))


def test_mutated_templates(small, mutations, monkeypatch):
    for name, value in {"SECONDS": 0.05, "TEXT": 20_000}.items():  # the same bounds, reached sooner
        monkeypatch.setattr(template_sandbox, name, value)
    pieces = [
        "{% for i in range(9999) %}", "{% endfor %}", "{{ x }}", "{% if messages %}", "{{ messages | tojson }}", "{%",
        "{% macro f(n) %}", "{% endmacro %}{{ f(1) }}", "{% break %}", "~ messages", "* 9999", "| join", "loop",
        "[0]", ".content", "tools", "{{ messages[0].content * 99999999 }}", "((((", "| list", "| sort", "'", "{#",
        "\ud800", "}}", "{% set x =",
    ]  # fmt: skip
    for seed in mutations:
        draw = random.Random(seed)
        source = QWEN25 if seed % 8 == 0 else TOOLS_TEMPLATE
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(source))
            source = source[:at] + draw.choice(pieces) + source[at + draw.choice((0, 0, 1, 20)) :]
        if seed % 8 == 7:
            source = damaged(seed, source.encode(errors="replace")).decode(errors="replace")
        tokenizer = Tokenizer(small, SETTINGS | {"chat_template": source})
        chat, tools = (CHAT, [weather]) if seed % 8 == 0 else (CHAT[:3], None)
        outcome = right_or_refused(seed, lambda t=tokenizer, c=chat, f=tools: t.chat_ids(c, tools=f))
        assert isinstance(outcome, list | UserError)


def test_mutated_conversations(small, mutations):
    tokenizer = Tokenizer(small, SETTINGS)
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
    good = {
        "messages": [
            {"role": "system", "content": parts}, {"role": "user", "content": "Hi", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [*CALLS, call]}, {"role": "tool", "content": parts},
            {"role": "assistant", "content": "Hello.", "refusal": None}, {"role": "user", "content": "So?"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {"y": {}}}}}, {"name": "g"}],
    }  # fmt: skip

    def ask(request) -> None:
        given, tools = (request.get(name) if isinstance(request, dict) else request for name in ("messages", "tools"))
        ids = tokenizer.chat_ids(given, tools=tools)
        text = tokenizer.render_chat(given, tools=tools)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        for message in given:  # nothing that was said is lost
            said = message.get("content") or ""
            assert all(part in text for part in ([said] if isinstance(said, str) else [p["text"] for p in said]))

    ask(good)
    for seed in mutations:
        right_or_refused(seed, lambda s=seed: ask(mutated(s, good)))
