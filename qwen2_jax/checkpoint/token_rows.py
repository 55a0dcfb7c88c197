# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens of equal length from a text file, to calibrate or compare models on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.tokenizer import Tokenizer

PIECE = 1 << 18  # characters of plain text that are encoded at a time
LEAST = 16  # tokens of a row
MAX_LINE = 1 << 24  # characters of a line


def token_rows(path: str | Path, tokenizer: Tokenizer, rows: int, length: int) -> np.ndarray:
    """The beginning of the file as int32 [n, T]: n rows at most, and at least two.

    path: UTF-8 text; with the suffix .jsonl, lines of objects with "messages" (and "tools"), which the chat template
    renders, or with "text". Pieces follow each other without padding, and what does not fill a row is left out. T is
    `length`, or less where the text has fewer than two such rows. Raises UserError for a file that cannot be used.
    """
    if rows < 2 or length < LEAST:
        raise UserError(f"asked for {rows} rows of {length} tokens; give at least 2 of {LEAST}")
    ids: list[int] = []
    try:
        for piece in _pieces(Path(path), tokenizer):
            ids += piece
            if len(ids) >= rows * length:
                break
    except OSError as why:
        raise UserError(f"{path} cannot be read: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a text file, or chats as .jsonl") from None
    length = min(length, len(ids) // 2)
    if length < LEAST:
        raise UserError(f"{path} has {len(ids)} tokens; at least {2 * LEAST} are needed, and many thousands are better")
    n = min(rows, len(ids) // length)
    return np.array(ids[: n * length], np.int32).reshape(n, length)


def _pieces(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    with open(path, encoding="utf-8") as file:
        if path.suffix.lower() != ".jsonl":
            while text := file.read(PIECE):
                yield tokenizer.encode(text + file.readline(MAX_LINE), allow_special=False, add_special_tokens=False)
            return
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            where = f"line {number} of {path}"
            if len(line) == MAX_LINE:
                raise UserError(f"{where} is longer than {MAX_LINE} characters")
            if line.strip():
                yield _record(parse_json_object(line, where), tokenizer, where)


def _record(record: dict, tokenizer: Tokenizer, where: str) -> list[int]:
    if "messages" in record:
        try:
            return tokenizer.chat_ids(record["messages"], add_generation_prompt=False, tools=record.get("tools"))
        except UserError as why:
            raise UserError(f"{where}: {why}") from None
    if not isinstance(record.get("text"), str):
        raise UserError(f'{where} has neither "messages" nor a "text"')
    return tokenizer.encode(record["text"], allow_special=False)
