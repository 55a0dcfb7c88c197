# SPDX-License-Identifier: Apache-2.0
"""Formats tokens for a terminal: highlights targets, spells out special tokens and escapes control characters.

Documents are untrusted, and an escape sequence in one could change the terminal's state or hide lines. All printed data
goes through `visible`.
"""

from collections.abc import Iterator, Sequence

from qwen2_jax.tokenizer import Tokenizer

STYLES = {"target": "bold green", "context": "dim", "special": "underline"}
MARKS = (">>", "<<")  # around targets on a console without colours


def runs(
    tokenizer: Tokenizer, ids: Sequence[int], is_target: Sequence[bool], marks: tuple[str, str] = ("", "")
) -> Iterator[tuple[str, str]]:
    """(text, style) for each run of tokens of one kind; joined, so that multi-token characters decode correctly.

    style: of rich, from STYLES. marks: put around targets. Control characters are spelled out.
    """
    kinds = [(bool(target), token in tokenizer.special_ids) for token, target in zip(ids, is_target, strict=True)]
    start = 0
    for i in range(1, len(ids) + 1):
        if i < len(ids) and kinds[i] == kinds[start]:
            continue
        target, special = kinds[start]
        style = STYLES["target" if target else "context"]
        if target and (start == 0 or not kinds[start - 1][0]):
            yield marks[0], style
        yield visible(tokenizer.decode(ids[start:i], False)), f"{style} {STYLES['special']}" if special else style
        if target and (i == len(ids) or not kinds[i][0]):
            yield marks[1], style
        start = i


def rank_name(rank: int, ranks: int) -> str:
    """The name of the sequence of this rank, in groups of at most `ranks` sequences."""
    return ("chosen", "rejected")[rank] if ranks == 2 else f"rank {rank + 1}"


def visible(text: str) -> str:
    """The text with control characters escaped, so that data cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
