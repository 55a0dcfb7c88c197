# SPDX-License-Identifier: Apache-2.0
"""A chat in the terminal."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli.prompts_and_answers import summary

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM

HELP = "/reset starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(lm: "LM", given: Mapping[str, Any], *, system: str | None = None, read=input) -> int:
    """Reads messages and answers them until the user leaves. read: like `input`. given: sampling parameters."""
    _history()
    print(HELP, file=sys.stderr)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            messages = list(start)
            print("a new conversation", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            conversation = [*messages, {"role": "user", "content": line}]
            answer = _answer(lm, conversation, given)
            if answer is not None:
                messages = [*conversation, {"role": "assistant", "content": answer}]


def _answer(lm: "LM", messages: list[dict[str, str]], given: Mapping[str, Any]) -> str | None:
    """Prints the answer as it is generated and returns it, up to where Ctrl-C stopped it. None: an error."""
    try:
        stream = lm.stream(messages, **given)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
            print(summary(stream), file=sys.stderr)
        except KeyboardInterrupt:
            print(flush=True)
            print("stopped", file=sys.stderr)
    except UserError as error:
        print(f"error: {error} (/reset starts over)", file=sys.stderr)
        return None
    return stream.generation.text


def _history() -> None:
    """Arrow keys edit the line and recall earlier ones, where Python has readline."""
    try:
        import readline  # noqa: F401  importing it is what switches it on
    except ImportError:
        return
