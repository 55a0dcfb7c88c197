# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2's byte-level BPE, conversations (chat_template.py), decoding while tokens arrive.

Everything is read from data files with the `tokenizers` library; no code from a checkpoint runs.
"""

import codecs
import functools
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen2_jax import chat_template, validate
from qwen2_jax.chat_template import ChatTemplate
from qwen2_jax.conversation import checked_messages
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.files.regular_file import is_regular_file
from qwen2_jax.tokenizer_files import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    add_tokens,
    in_one_line,
    named_templates,
    open_tokenizer,
    open_vocabulary,
    read_text,
    template_tokens,
)
from qwen2_jax.tool_schema import checked_tools

# Qwen2's pre-tokenisation: like GPT-4's, with every digit on its own.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pipeline(model: models.Model) -> tokenizers.Tokenizer:
    """A bare tokenizer with Qwen2's normalisation, pre-tokenisation and decoder around a BPE model."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


class Tokenizer:
    """A byte-level tokenizer with its special tokens and chat template. Safe to use from several threads.

    chat_template: the default template's Jinja source, or None where there is none; chat_templates: all, by name.
    special_ids: ids of the special tokens; bos_id, eos_id, pad_id: as tokenizer_config.json names them, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        where: str | Path = "tokenizer_config.json",
    ):
        """settings: the contents of tokenizer_config.json; where: its path, for errors."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise UserError(f"the tokenizer's decoder is {validate.short(backend.decoder)}; supported: ByteLevel")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._lock = threading.Lock()  # whether special tokens are matched is a switch inside the backend
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special = {added[i].content: i for i in self.special_ids}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        settings = settings or {}
        self._template_tokens = template_tokens(settings, where)
        self.bos_id, self.eos_id, self.pad_id = (
            self.token_id(cast("str | None", self._template_tokens.get(name)))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        named = named_templates(settings.get("chat_template"), where)
        if not named and {IM_START, IM_END} <= self._special.keys():
            named = {"default": chat_template.CHATML}
        self.chat_templates = ChatTemplate(named, self._template_tokens)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json and the chat templates.

        Templates in files (chat_template.jinja, which is the default, and additional_chat_templates/NAME.jinja) take
        precedence over those in tokenizer_config.json. Raises FileNotFoundError when the folder has no tokenizer,
        UserError when a file cannot be used.
        """
        folder = Path(path)
        where = folder / "tokenizer_config.json"
        settings = parse_json_object(where.read_bytes(), str(where)) if is_regular_file(where) else {}
        files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if is_regular_file(folder / "chat_template.jinja"):
            files["default"] = folder / "chat_template.jinja"
        if files:
            settings["chat_template"] = {name: read_text(file) for name, file in files.items()}
        if is_regular_file(folder / "tokenizer.json"):
            return cls(open_tokenizer(folder / "tokenizer.json"), settings, where)
        if is_regular_file(folder / "vocab.json") and is_regular_file(folder / "merges.txt"):
            backend = pipeline(open_vocabulary(folder / "vocab.json", folder / "merges.txt"))
            add_tokens(backend, settings.get("added_tokens_decoder"), where)
            return cls(backend, settings, where)
        raise FileNotFoundError(f"{folder} has no tokenizer.json and no vocab.json with merges.txt")

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, None where there is no template or none of several is the default."""
        return self.chat_templates.default

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest id plus one. The model's embedding may be padded beyond it: those ids mean nothing."""
        return max(self.vocabulary.values()) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, spelled in byte-level characters, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def splits_as_qwen2(self) -> bool:
        """Whether text is normalised and split before BPE as Qwen2's tokenizer does it."""
        ours, theirs = (json.loads(backend.to_str()) for backend in (pipeline(models.BPE()), self._backend))
        for settings in (ours, theirs):  # offsets do not change ids
            for part in (settings["pre_tokenizer"] or {}).get("pretokenizers", []):
                part.pop("trim_offsets", None)
        return all(ours[name] == theirs[name] for name in ("normalizer", "pre_tokenizer"))

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._backend.to_str()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: eos_token, else those of <|endoftext|> and <|im_end|> that exist."""
        if self.eos_id is not None:
            return (self.eos_id,)
        return tuple(self._special[name] for name in (END_OF_TEXT, IM_END) if name in self._special)

    @property
    def fill_id(self) -> int:
        """The id that pads a row. Raises UserError if there is no token that could."""
        fill = next((token for token in (self.pad_id, *self.eos_ids) if token is not None), None)
        if fill is None:
            raise UserError(
                "this tokenizer has no token to fill rows with; name a pad_token or eos_token in its "
                "tokenizer_config.json"
            )
        return fill

    def token_id(self, token: str | None) -> int | None:
        """The id of one token by its spelling, None when there is no such token."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, allow_special: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text's NFC form.

        allow_special=False: text that spells a special token, such as "<|im_end|>", is taken as ordinary characters.
        add_special_tokens=False, for a part of a longer text: without the tokens that tokenizer.json's post-processor
        puts in front of a text and behind it. Qwen2's has none; models distilled from others begin with one.
        Raises UserError for text that is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text], allow_special=allow_special, add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = True, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        for text in texts:
            validate.unicode_text(text, "the text to encode")
        before, after = self.added_around if add_special_tokens else ([], [])
        with self._lock, in_one_line("the tokenizer failed to encode a text"):
            self._backend.encode_special_tokens = not allow_special
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*before, *e.ids, *after] for e in encoded] if before or after else [e.ids for e in encoded]

    @functools.cached_property
    def added_around(self) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts in front of every text, and behind it."""
        with in_one_line("the tokenizer failed to encode a text"):
            bare, whole = (self._backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise UserError("the tokenizer's post-processor changes the tokens of a text; supported: adding some around it")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, and ids without a token (padding) become nothing."""
        return b"".join(self.token_bytes(int(i), skip_special_tokens) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes one token stands for: possibly a part of a character."""
        if skip_special_tokens and token in self.special_ids:
            return b""
        known = self._bytes.get(token)
        if known is None:
            spelling = self._backend.id_to_token(token) or "" if token >= 0 else ""
            alphabet = _byte_of_character()
            if token not in self.special_ids and all(character in alphabet for character in spelling):
                known = bytes(alphabet[character] for character in spelling)
            else:
                known = spelling.encode()
            self._bytes[token] = known
        return known

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The conversation as one text, byte for byte what transformers' apply_chat_template gives.

        messages: dicts with "role" (one of ROLES), "content" and, of the assistant, "tool_calls", in any of the forms
        that conversation.py describes. tools: what the model may call, JSON schemas as the OpenAI API has them or
        Python functions (tool_schema.py). Raises UserError naming the message or tool at fault, also where the template
        leaves tools, tool calls or their results out. To get ids, use `chat_ids`: encoding this text would let a
        message forge special tokens.
        """
        messages, tools = checked_messages(messages), checked_tools(tools)
        self.chat_templates.check_nothing_left_out(messages, tools)
        return self.chat_templates.render(messages, tools, add_generation_prompt)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Ids of the conversation that `render_chat` renders, in which special tokens come from the template only.

        A message that spells one gets the ids of its characters; otherwise the ids are those of transformers.
        """
        messages, tools = checked_messages(messages), checked_tools(tools)
        self.chat_templates.check_nothing_left_out(messages, tools)
        return self.checked_chat_ids(messages, tools, add_generation_prompt)

    def checked_chat_ids(self, messages: Any, tools: Any, add_generation_prompt: bool) -> list[int]:
        """`chat_ids` of messages and tools that are in the form of the checks, and of which the template writes all."""
        messages, tools, mark = self.mark_special(messages, tools)
        return self.ids_of_marked(self.chat_templates.render(messages, tools, add_generation_prompt), mark)

    def mark_special(self, messages: Any, tools: Any) -> tuple[Any, Any, str]:
        """Messages and tools in which no special token is spelled, and the mark that was put inside of each.

        It is a private-use character that occurs nowhere else; `ids_of_marked` takes it out again, once the template's
        own special tokens have been found.
        """
        texts = [self.chat_templates.source(tools)]
        chat_template.map_text([messages, tools], texts.append)
        mark = next((mark for mark in map(chr, range(0xE000, 0xF900)) if not any(mark in text for text in texts)), None)
        if mark is None:
            raise UserError("the messages contain every private-use character, U+E000 to U+F8FF; leave one out")
        split = functools.partial(self._special_pattern.sub, lambda match: match[0][:1] + mark + match[0][1:])
        return *chat_template.map_text([messages, tools], split), mark

    def ids_of_marked(self, rendered: str, mark: str) -> list[int]:
        """Ids of a rendered conversation, or of its part from a special token on, in which only messages have marks."""
        encode = functools.partial(self.encode, add_special_tokens=False)
        if mark not in rendered:
            return encode(rendered)
        ids, start = [], 0
        for match in self.special_matches(rendered):
            ids += encode(rendered[start : match.start()].replace(mark, ""), allow_special=False)
            ids.append(self._special[match[0]])
            start = match.end()
        return ids + encode(rendered[start:].replace(mark, ""), allow_special=False)

    def special_matches(self, text: str) -> list[re.Match[str]]:
        """Where the text spells special tokens."""
        return [*self._special_pattern.finditer(text)]


class StreamDecoder:
    """Turns ids into text one at a time; the pieces add up to `tokenizer.decode` of all ids.

    A character split over tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, self._skip))

    def flush(self) -> str:
        """The text held back, as U+FFFD; call once after the last token."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other bytes for U+0100 and up."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}
