# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a tokenizer, which others wrote: what cannot be used is refused in one line."""

import contextlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.files.regular_file import is_regular_file
from qwen2_jax.files.stderr_on_success import stderr_on_success

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]{1,40}"')
DOUBLINGS = 8  # of a text; Qwen2's ByteLevel is one
INSIDE = ("normalizers", "pretokenizers")  # of a Sequence
# Where a normaliser, a pre-tokeniser or a post-processor is broken, one of these makes the library panic.
PROBES = ("", " a b\n", "H\u00e4user \u4f60\u597d e\u0301 42 \U0001f600\n\n")


def template_tokens(settings: Mapping[str, Any], where: str | Path) -> dict[str, str | list[str]]:
    """The special tokens that tokenizer_config.json names, by the names that templates use."""
    tokens: dict[str, str | list[str]] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens"):
        value = settings.get(name)
        several = name == "additional_special_tokens"
        if value is None or value == "" or (several and value == []):
            continue
        given = [_content(entry) for entry in value] if several and isinstance(value, list) else [_content(value)]
        if None in given or (several and not isinstance(value, list)):
            kind = "a list of texts" if several else 'a text, an object like {"content": text}, or null'
            raise UserError(f"{where}: {name} is {validate.short(value)}; it must be {kind}")
        tokens[name] = given if several else given[0]  # type: ignore[assignment]  # None was refused
    return tokens


def _content(token: Any) -> str | None:
    """The spelling of a special token, which is written as text or as {"content": text, ...}; None: it is neither."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def named_templates(given: Any, where: str | Path) -> dict[str, str]:
    """The chat templates by name: tokenizer_config.json holds one as text, or several as an object or a list."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    named = given
    if isinstance(given, list) and all(isinstance(entry, Mapping) for entry in given):
        named = {str(entry.get("name", "")): entry.get("template") for entry in given}
    named = named if isinstance(named, Mapping) else {}
    if not named or not all(isinstance(source, str) and 0 < len(name) <= 100 for name, source in named.items()):
        raise UserError(
            f"{where}: chat_template is {validate.short(given)}; it must be a template's text, an object of named "
            'ones, or a list of {"name": ..., "template": ...}'
        )
    return dict(named)


def add_tokens(backend: tokenizers.Tokenizer, added: Any, where: str | Path) -> None:
    """Adds {id: {content, special, ...}} behind the vocabulary; without it the three tokens every Qwen2 has."""
    default: list[Any] = [(None, {"content": name, "special": True}) for name in (END_OF_TEXT, IM_START, IM_END)]
    for wanted, entry in sorted(_added_tokens(added, where), key=operator.itemgetter(0)) or default:
        flags = {key: bool(entry.get(key)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        token = tokenizers.AddedToken(entry["content"], **flags)
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if wanted not in (None, got):
            raise UserError(f"{where} gives {validate.short(token.content)} id {wanted}; the vocabulary makes it {got}")


def _added_tokens(added: Any, where: str | Path) -> list[tuple[int, Mapping[str, Any]]]:
    if added is not None and not isinstance(added, Mapping):
        raise UserError(
            f"{where}: added_tokens_decoder is {validate.short(added)}; it must be an object of tokens by id"
        )
    for key, entry in (added or {}).items():
        if not (key.isascii() and key.isdecimal() and isinstance(entry, Mapping) and _content(entry)):
            raise UserError(
                f"{where}: added_tokens_decoder has {validate.short(key)}: {validate.short(entry)}; each must be an "
                'id with an object like {"content": text, "special": true}'
            )
    return [(int(key), entry) for key, entry in (added or {}).items()]


def read_text(path: Path) -> str:
    is_regular_file(path)  # raises for a folder, a pipe or a broken link
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, tried on a text. Raises UserError where the library refuses it or panics."""

    def read() -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_file(str(path))
        _check_growth(path, backend)
        for text in PROBES:
            backend.encode(text)
        return backend

    backend = _opened(path, read)
    dropout = getattr(backend.model, "dropout", None)
    if dropout:
        raise UserError(f"{path}: dropout is {dropout:g}, so a text would get other ids each time; supported: null")
    return backend


def _check_growth(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Raises UserError for a normaliser and pre-tokeniser that would make a short text fill the memory.

    Fifty ByteLevel steps double a letter fifty times, and so do replacements; no process survives that.
    """
    steps = [json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part]
    doublings, level = 0.0, steps
    while level:
        for step in level:
            match step.get("type"):
                case "ByteLevel" | "BertNormalizer":
                    doublings += 1
                case "Replace":
                    doublings += math.log2(1 + len(str(step.get("content", ""))))
        level = [inner for step in level for name in INSIDE for inner in step.get(name) or ()]
    if doublings > DOUBLINGS:
        raise UserError(
            f"{path}: its normalizer and pre_tokenizer can double a text {doublings:.0f} times; at most {DOUBLINGS}"
        )


def open_vocabulary(vocabulary: Path, merges: Path) -> models.BPE:
    """The model of vocab.json and merges.txt."""
    return _opened(vocabulary, lambda: models.BPE.from_file(str(vocabulary), str(merges)))


def _opened[Read](path: Path, read: Callable[[], Read]) -> Read:
    # The library panics where a merge is shorter than this prefix; no byte-level BPE has one.
    if found := SUBWORD_PREFIX.search(path.read_bytes()):
        raise UserError(f"{path} cannot be read as a tokenizer: it has {found[0].decode()}; supported: null")
    with in_one_line(f"{path} cannot be read as a tokenizer"), stderr_on_success():
        return read()


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """What the library raises inside is a UserError that begins with `what`.

    It raises Exception and, where its Rust code panics, BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        why = " ".join(str(error).split())[:300].encode(errors="backslashreplace").decode()
        raise UserError(f"{what}: {why}") from error
