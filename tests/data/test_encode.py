# SPDX-License-Identifier: Apache-2.0
"""Ids are the chat template's own and the targets are the answers: read back from the ids, for several templates."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

import qwen2_jax.demo
from few import MANY
from qwen2_jax.data.formats.record_formats import Chat, Text, read
from qwen2_jax.data.tokens import encode, message_spans
from qwen2_jax.data.tokens.encode import Encoder
from qwen2_jax.data.tokens.loss_mask import Targets
from qwen2_jax.errors import UserError
from qwen2_jax.speedrun import bpe
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen2_tokenizer"
CORPUS = ["Hello world, this is a small tokenizer. It's 2024!\n\n\nuser assistant system", "für Häuser 你好 😀\n"] * 4

# As in the released Qwen2-7B-Instruct; the spelling differs from chat_template.CHATML, the output does not.
RELEASED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = RELEASED.replace("loop.first and ", "false and ")
TRIMMED = RELEASED.replace("message['content'] +", "message['content'] | trim +")  # not ChatML where it trims something
TOOLS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content }}
    {%- if message.role == 'tool' %}{{ '(tool)' }}{% endif %}
    {%- for call in message.tool_calls or [] %}{{ '\\n<call>' + (call | tojson) + '</call>' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
PLAIN = (  # no special token but the one that ends an answer
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'Bot: ' + m.content + eos_token + '\n' }}"
    "{% else %}{{ 'Human: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)
THINKING = (  # forgets the thoughts of earlier answers, as Qwen3's does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTED = RELEASED.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")

U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))


def chat(*messages, train=None):
    return Chat(list(messages), list(train or [True] * len(messages)))


@pytest.fixture(scope="module")
def backend():
    return bpe.train(CORPUS, vocab_size=320)


@pytest.fixture(scope="module")
def tiny(backend):
    return Tokenizer(backend)


def with_template(backend, template):
    return Tokenizer(backend, {"chat_template": template, "eos_token": IM_END})


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def tokenizer(request, tiny, tmp_path_factory):
    if request.param == "tiny":
        return tiny
    if not QWEN.exists():
        pytest.skip("no shared data: the released Qwen2 tokenizer is not here")
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copy(QWEN / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text(RELEASED, "utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    return Encoder(tokenizer), Encoder(Tokenizer.from_folder(Path(qwen2_jax.demo.__file__).parent))


def targeted(tokenizer, encoded):
    """The targets, read back; runs that do not touch are separate."""
    assert len(encoded.tokens) == len(encoded.is_target) == len(encoded)
    runs, inside = [], False
    for token, is_target in zip(encoded.tokens, encoded.is_target, strict=True):
        if is_target:
            runs = runs if inside else [*runs, []]
            runs[-1].append(token)
        inside = is_target
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


DEFAULT = f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n"
TURNS = [U("Hello"), A(" world \n"), U("It's"), A("2024!")]
FRAME = f"{IM_END}\n{IM_START}"
WANT = {
    "assistant": [f" world \n{IM_END}", f"2024!{IM_END}"],
    "assistant_newline": [f" world \n{IM_END}\n", f"2024!{IM_END}\n"],
    "last_assistant": [f"2024!{IM_END}"],
    "turns_qwen1": [IM_START, FRAME, FRAME, f" world \n{FRAME}", FRAME, f"2024!{IM_END}\n"],
}


@pytest.mark.parametrize("targets", get_args(Targets))
def test_targets_of_a_conversation(tokenizer, targets):
    encoder = Encoder(tokenizer, targets)
    encoded = encoder.encode(chat(*TURNS))
    assert encoder._default_system == [S("You are a helpful assistant.")]  # the quick way is taken
    assert encoded.tokens == tokenizer.chat_ids(TURNS, add_generation_prompt=False)
    assert tokenizer.decode(encoded.tokens, False).startswith(DEFAULT)
    rendered = tokenizer.render_chat(TURNS, add_generation_prompt=False)
    assert targeted(tokenizer, encoded) == WANT.get(targets, [rendered])
    if targets == "last_assistant":  # the only one that changes when the user has the last word
        assert targeted(tokenizer, encoder.encode(chat(*TURNS, U("bye")))) == WANT["last_assistant"]


@pytest.mark.parametrize("way", ["pieces", "prefixes"])
@pytest.mark.parametrize("targets", [t for t in get_args(Targets) if t != "turns_qwen1"])
def test_both_ways_agree(tokenizer, targets, way):
    encoder = Encoder(tokenizer, targets)
    if way == "prefixes":
        encoder.__dict__["_default_system"] = None
    for document in (
        chat(S(""), *TURNS),
        chat(*TURNS, U("user"), U("again")),
        chat(*TURNS, train=[True, False, True, True]),
        chat(*TURNS, train=[True, True, True, False]),
        chat(S("s"), *TURNS, train=[True, False, True, True, True]),
        chat(U("say <|im_end|>\n<|im_start|>assistant\n"), A("<|im_end|> <|im_"), U("\n"), A("")),
        chat(U("\n\n"), A("\n\n\nafter newlines")),  # share a token with the newline before them
        chat(U("q")),
    ):
        encoded = encoder.encode(document)
        assert encoded.tokens == tokenizer.chat_ids(document.messages, add_generation_prompt=False)
        assert way == "pieces" or encoded == Encoder(tokenizer, targets).encode(document)
        if len(document.messages) == 1 and targets != "all":
            assert not any(encoded.is_target)


def test_newlines_before_an_answer_belong_to_the_prompt(tokenizer):
    """The generation prompt ends with a newline: a token that holds it and more can never be generated after it."""
    assert len(tokenizer.encode("\n\n")) == 1
    encoded = Encoder(tokenizer).encode(chat(U("q"), A("\nHello")))
    assert targeted(tokenizer, encoded) == [f"Hello{IM_END}"]


def test_a_message_taken_out_of_training_has_no_targets(tiny):
    want = {
        "assistant": [f"2024!{IM_END}"],
        "assistant_newline": [f"2024!{IM_END}\n"],
        "last_assistant": [f"2024!{IM_END}"],
        "turns_qwen1": [IM_START, FRAME, f"{IM_END}\n", IM_START, FRAME, f"2024!{IM_END}\n"],
        "all": [
            f"{DEFAULT}{IM_START}user\nHello{IM_END}\n",
            f"{IM_START}user\nIt's{IM_END}\n{IM_START}assistant\n2024!{IM_END}\n",
        ],
    }
    for targets in get_args(Targets):
        encoded = Encoder(tiny, targets).encode(chat(*TURNS, train=[True, False, True, True]))
        assert targeted(tiny, encoded) == want[targets]
    encoded = Encoder(tiny, "last_assistant").encode(chat(*TURNS, train=[True, True, True, False]))
    assert targeted(tiny, encoded) == []


def test_text_ends_with_end_of_text_and_is_all_target(tokenizer):
    for text in ("Hello\n", "", "a <|endoftext|> b<|im_start|>"):
        encoded = Encoder(tokenizer).encode(Text(text))
        assert encoded.tokens == [*tokenizer.encode(text, allow_special=False), tokenizer.token_id(END_OF_TEXT)]
        assert encoded.is_target == [True] * len(encoded)
        assert tokenizer.decode(encoded.tokens, False) == text + END_OF_TEXT


WHITE = ["\n", "\r", " ", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u180e", "\u200b", "\u2028", "\u3000"]
PARTS = ["a", "'s", "Hello", "1", "!", ";\n", "\u0301", "\u0338", "\u1161", "é", "你", "😀", IM_END, END_OF_TEXT]


@MANY
@given(st.lists(st.sampled_from(WHITE) | st.sampled_from(PARTS) | st.just("\n"), max_size=40).map("".join))
def test_a_long_text_in_pieces_is_the_whole(encoders, text):
    for encoder in encoders:
        whole = encoder.encode(Text(text))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "PIECE", 1)
            patch.setattr(encode, "TOGETHER", 2)
            assert "".join(encode._pieces(text)) == text
            assert encoder.encode(Text(text)) == whole
            assert encoder.encode_batch([Text("a"), Text(text), Text("b")])[1] == whole


def test_a_long_text_is_cut(tokenizer, monkeypatch):
    text, seen = "Some words, \n\n  more.\n" * 60_000, []
    real = Tokenizer.encode_batch
    record = lambda self, texts, **given: seen.append(sum(map(len, texts))) or real(self, texts, **given)
    monkeypatch.setattr(Tokenizer, "encode_batch", record)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Text(text))
    assert len(seen) > 2 and max(seen) < len(text) * 0.9
    monkeypatch.setattr(encode, "PIECE", len(text))
    assert encoder.encode(Text(text)) == encoded


@pytest.mark.parametrize("change", ["split", "added"])
def test_another_tokenizer_is_given_long_texts_whole(backend, change):
    """GPT-2 splits "\\n\\nfoo" elsewhere than "\\n\\n" and "foo"."""
    data = json.loads(backend.to_str())
    if change == "split":
        data["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
    else:
        data["added_tokens"].append(
            data["added_tokens"][0] | {"id": 999, "content": "<x>", "special": False, "lstrip": True}
        )
    other = Encoder(Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data))))
    assert Encoder(Tokenizer(backend))._may_cut and not other._may_cut


def test_a_batch_equals_one_by_one(tokenizer):
    encoder = Encoder(tokenizer)
    documents = [Text("a"), chat(*TURNS), chat(U("q")), Text("b\n"), chat(S("s"), *TURNS[:2])] * 3
    assert encoder.encode_batch(documents) == [encoder.encode(document) for document in documents]
    assert encoder.encode_batch([]) == []


contents = st.text(max_size=20) | st.lists(
    st.sampled_from(
        [IM_END, IM_START, END_OF_TEXT, "<|im_", "end|>", "\n", "\r", " ", "assistant", "\u0301", "\u0338", "é"]
    ),
    max_size=8,
).map("".join)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": contents}),
    min_size=1,
    max_size=4,
)


@MANY
@example([U("\u0338"), A("\n\u0301"), U(""), A("\n")], "")
@given(turns, st.none() | contents)
def test_ids_are_the_templates_and_targets_the_answers(tiny, messages, system):
    """Whatever the messages say: the ids are chat_ids', and the targets spell the answers and nothing else."""
    import unicodedata

    messages = messages if system is None else [S(system), *messages]
    encoder = Encoder(tiny)
    encoded = encoder.encode(chat(*messages))
    assert encoded.tokens == tiny.chat_ids(messages, add_generation_prompt=False)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    runs = targeted(tiny, encoded)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        whole = unicodedata.normalize("NFC", "\n" + answer) + IM_END
        assert whole.endswith(run)
        assert not whole[: len(whole) - len(run)].strip()  # white space that shares a token with the newline before it
    ends = [token for token, is_target in zip(encoded.tokens, encoded.is_target, strict=True) if is_target]
    assert sum(token in tiny.special_ids for token in ends) == len(
        answers
    )  # one each; what only looks like one is none


@pytest.mark.parametrize("template", [NO_SYSTEM, TRIMMED, TOOLS])
def test_other_templates(backend, template):
    tokenizer = with_template(backend, template)
    for messages in (TURNS, [S("sys"), *TURNS], [*TURNS, U("bye")], [U("<|im_end|>"), A("a <|im_start|> b")]):
        encoded = Encoder(tokenizer).encode(chat(*messages))
        assert encoded.tokens == tokenizer.chat_ids(messages, add_generation_prompt=False)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        want = [f"{answer.strip() if template == TRIMMED else answer}{IM_END}" for answer in answers]
        assert targeted(tokenizer, encoded) == want


def test_a_template_without_special_tokens_before_an_answer(backend):
    tokenizer = with_template(backend, PLAIN)
    messages = [*TURNS, U("Hello"), A("world")]
    encoded = Encoder(tokenizer).encode(chat(*messages))
    assert encoded.tokens == tokenizer.chat_ids(messages, add_generation_prompt=False)
    # "Bot: world" has the token " world", which the prompt's blank belongs to; it is no target.
    assert targeted(tokenizer, encoded) == [f" world \n{IM_END}", f"2024!{IM_END}", IM_END]


def test_tool_calls(backend, tiny):
    call = {"name": "f", "arguments": {"x": "<|im_end|>"}}
    record = {
        "messages": [U("q"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}, A("a")]
    }
    document = read(record, "messages", "here")
    tokenizer = with_template(backend, TOOLS)
    encoded = Encoder(tokenizer).encode(document)
    assert encoded.tokens == tokenizer.chat_ids(document.messages, add_generation_prompt=False)
    written = '<call>{"name": "f", "arguments": {"x": "<|im_end|>"}}</call>'
    assert targeted(tokenizer, encoded) == [f"{written}{IM_END}", f"a{IM_END}"]
    with pytest.raises(UserError, match=r"messages\[1\] has tool_calls, which .* template leaves out"):
        Encoder(tiny).encode(document)


def test_thoughts_beside_the_content(backend, tiny):
    document = chat(U("q"), A("a") | {"reasoning_content": "hm"})
    with pytest.raises(UserError, match=r"messages\[1\] has reasoning_content, which .* template leaves out"):
        Encoder(tiny).encode(document)
    written = NO_SYSTEM.replace("message['content'] +", "(message.reasoning_content or '') + message['content'] +")
    tokenizer = with_template(backend, written)
    assert targeted(tokenizer, Encoder(tokenizer).encode(document)) == [f"hma{IM_END}"]


def test_templates_that_hide_where_answers_are(backend):
    thinking = with_template(backend, THINKING)
    messages = [U("q"), A("<think>hm</think>a"), U("r"), A("<think>so</think>b")]
    with pytest.raises(UserError, match=r"messages\[:2\] .*changes them .*last_assistant"):
        Encoder(thinking).encode(chat(*messages))
    last = Encoder(thinking, "last_assistant").encode(chat(*messages))
    assert targeted(thinking, last) == [f"<think>so</think>b{IM_END}"]
    assert targeted(thinking, Encoder(thinking).encode(chat(*messages[:2]))) == [f"<think>hm</think>a{IM_END}"]
    prompted = with_template(backend, PROMPTED)
    with pytest.raises(UserError, match=r"messages\[:1\] .*generation prompt is not how an answer begins"):
        Encoder(prompted).encode(chat(U("q"), A("a")))
    assert targeted(prompted, Encoder(prompted).encode(chat(U("q"), A("<think>a")))) == [f"a{IM_END}"]


def test_what_cannot_be_encoded(backend, tiny):
    with pytest.raises(UserError, match="targets is 'user'; supported: 'assistant'"):
        Encoder(tiny, "user")
    plain = with_template(backend, PLAIN)
    with pytest.raises(UserError, match="'turns_qwen1' needs a ChatML template"):
        Encoder(plain, "turns_qwen1").encode(chat(*TURNS))
    with pytest.raises(UserError, match=r"messages\[0\] is the assistant's"):
        Encoder(plain).encode(chat(A("a"), U("q")))
    assert targeted(tiny, Encoder(tiny).encode(chat(A("a"), U("q")))) == [f"a{IM_END}"]
    bare = Tokenizer(_without_special_tokens(backend))
    with pytest.raises(UserError, match=r"no special token <\|endoftext\|>"):
        Encoder(bare).encode(Text("a"))
    with pytest.raises(UserError, match="no chat template"):
        Encoder(bare).encode(chat(*TURNS))


def _without_special_tokens(backend):
    data = json.loads(backend.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": []}))


@pytest.mark.parametrize("targets", ["assistant", "all"])
def test_a_long_conversation_is_encoded_once(backend, targets, monkeypatch):
    """Under any template: only its text is rendered again for each answer."""
    tokenizer = with_template(backend, NO_SYSTEM)
    messages = [U("It's <|im_end|> é\u0301"), A("Hello " * 50 + "\n")] * 30
    document = chat(*messages, train=[True, True, True, False] * 15)
    want = Encoder(tokenizer, targets).encode(document)
    encoder, seen = Encoder(tokenizer, targets), []
    encoder.__dict__["_default_system"] = None
    real = Tokenizer.encode_batch
    record = lambda self, texts, **given: seen.append(sum(map(len, texts))) or real(self, texts, **given)
    monkeypatch.setattr(Tokenizer, "encode_batch", record)
    assert encoder.encode(document) == want
    assert sum(seen) < 4 * sum(len(message["content"]) for message in messages)
    monkeypatch.setattr(message_spans, "MOST", 10 * len(messages))
    with pytest.raises(UserError, match="of 60 messages more than 10 are to be told apart .*'last_assistant'"):
        encoder.encode(document)


def test_special_tokens_that_strip_blanks(backend):
    """Their tokens are fewer than what the text spells; answers are found all the same."""
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] == IM_START
    tokenizer = with_template(
        tokenizers.Tokenizer.from_str(json.dumps(data)), PLAIN.replace("'Bot: '", "'<|im_start|>  Bot:'")
    )
    encoded = Encoder(tokenizer).encode(chat(*TURNS, U("\u0338"), A("\u0301a")))
    assert targeted(tokenizer, encoded) == [f" world \n{IM_END}", f"2024!{IM_END}", f"\u0301a{IM_END}"]
