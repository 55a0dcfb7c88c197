# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2's byte-level BPE, conversations (chat_template.py), decoding while tokens arrive.

Everything is read from data files with the `tokenizers` library; no code from a checkpoint runs.
"""

import codecs
import functools
import json
import operator
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen2_jax import chat_template, validate
from qwen2_jax.errors import UserError

# Qwen2's pre-tokenisation: like GPT-4's, with every digit on its own.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


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

    chat_template: Jinja source, or None where the folder has none and Qwen2's own does not apply; chat then fails.
    special_ids: ids of the special tokens; bos_id, eos_id, pad_id: as tokenizer_config.json names them, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any] | None = None):
        """settings: the contents of tokenizer_config.json."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise UserError(f"the tokenizer's decoder is {backend.decoder}; supported: ByteLevel")
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
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
        self._template_tokens = {name: _content(settings[name]) for name in names if settings.get(name)}
        self.bos_id, self.eos_id, self.pad_id = (
            self.token_id(self._template_tokens.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        )
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None and {IM_START, IM_END} <= self._special.keys():
            template = chat_template.CHATML
        self.chat_template: str | None = template

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json and chat_template.jinja.

        Raises FileNotFoundError when the folder has no tokenizer, UserError when a file cannot be used.
        """
        folder = Path(path)
        settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if (folder / "chat_template.jinja").exists():
            settings["chat_template"] = (folder / "chat_template.jinja").read_text("utf-8")
        if (folder / "tokenizer.json").exists():
            return cls(_open(folder / "tokenizer.json", tokenizers.Tokenizer.from_file), settings)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            read = functools.partial(models.BPE.from_file, merges=str(folder / "merges.txt"))
            backend = pipeline(_open(folder / "vocab.json", read))
            _add_tokens(backend, settings.get("added_tokens_decoder"))
            return cls(backend, settings)
        raise FileNotFoundError(f"{folder} has no tokenizer.json and no vocab.json with merges.txt")

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest id plus one. The model's embedding may be padded beyond it: those ids mean nothing."""
        return max(self.vocabulary.values()) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, spelled in byte-level characters, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: eos_token, else those of <|endoftext|> and <|im_end|> that exist."""
        if self.eos_id is not None:
            return (self.eos_id,)
        return tuple(self._special[name] for name in (END_OF_TEXT, IM_END) if name in self._special)

    @property
    def fill_id(self) -> int:
        """The id that fills what is left of a row. Raises UserError if there is no token that could."""
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

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Token ids of the text's NFC form; nothing is added in front or behind.

        allow_special=False: text that spells a special token, such as "<|im_end|>", is taken as ordinary characters.
        Raises UserError for text that is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        for text in texts:
            _check_text(text)
        with self._lock:
            self._backend.encode_special_tokens = not allow_special
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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

        messages: dicts with "role" (one of ROLES) and "content" (text). Raises UserError naming the message at fault.
        tools: what the model may call: JSON schemas as the OpenAI API has them.
        To get ids, use `chat_ids`: encoding this text would let a message forge special tokens.
        """
        chat_template.check_messages(messages)
        return self._render(messages, add_generation_prompt, tools)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Ids of the rendered conversation, in which special tokens come from the template only.

        A message that spells one gets the ids of its characters; otherwise the ids are those of transformers.
        """
        chat_template.check_messages(messages)
        # A private-use character that occurs nowhere else is put inside every spelling of a special token, and taken
        # out again once the template's own special tokens have been found.
        texts = [self.chat_template or ""]
        chat_template.map_text(list(messages), texts.append)
        mark = next((mark for mark in map(chr, range(0xE000, 0xF900)) if not any(mark in text for text in texts)), None)
        if mark is None:
            raise UserError("the messages contain every private-use character, U+E000 to U+F8FF; leave one out")
        split = functools.partial(self._special_pattern.sub, lambda match: match[0][:1] + mark + match[0][1:])
        rendered = self._render(chat_template.map_text(list(messages), split), add_generation_prompt, tools)
        if mark not in rendered:
            return self.encode(rendered)
        ids, start = [], 0
        for match in self._special_pattern.finditer(rendered):
            ids += self.encode(rendered[start : match.start()].replace(mark, ""), allow_special=False)
            ids.append(self._special[match[0]])
            start = match.end()
        return ids + self.encode(rendered[start:].replace(mark, ""), allow_special=False)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Sequence[Any] | None
    ) -> str:
        if self.chat_template is None:
            raise UserError("this checkpoint has no chat template and no <|im_start|> token; give a plain prompt")
        return chat_template.render(self.chat_template, messages, add_generation_prompt, self._template_tokens, tools)


class StreamDecoder:
    """Turns ids into text one at a time; what the pieces add up to is `tokenizer.decode` of all ids.

    A character split over tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, self._skip))

    def flush(self) -> str:
        """What was held back, as U+FFFD; call once after the last token."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other bytes for U+0100 and up."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"cannot encode {validate.short(text)}; it must be text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error


def _content(token: Any) -> Any:
    """Special tokens are written as text, as {"content": text, ...}, or as a list of either."""
    if isinstance(token, list):
        return [_content(entry) for entry in token]
    return token["content"] if isinstance(token, Mapping) else token


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Adds {id: {content, special, ...}} behind the vocabulary; without it the three tokens every Qwen2 has."""
    entries = [(int(key), entry) for key, entry in (added or {}).items()]
    default: list[Any] = [(None, {"content": name, "special": True}) for name in (END_OF_TEXT, IM_START, IM_END)]
    for wanted, entry in sorted(entries, key=operator.itemgetter(0)) or default:
        flags = {key: bool(entry.get(key)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        token = tokenizers.AddedToken(entry["content"], **flags)
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if wanted not in (None, got):
            raise UserError(f"tokenizer_config.json gives {token.content!r} id {wanted}; the vocabulary makes it {got}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


def _open(path: Path, read) -> Any:
    try:
        return read(str(path))
    except Exception as error:  # the tokenizers library raises Exception itself, nothing narrower
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error
