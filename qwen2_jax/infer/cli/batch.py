# SPDX-License-Identifier: Apache-2.0
"""Answers a file of prompts into a file of answers, both JSON lines; may be interrupted at any byte and resumed.

Every answer has the number of its input line and a digest of that line. A second run keeps the complete answers, cuts
off a half-written last one, and computes the rest: no line is lost and none is answered twice.
"""

import contextlib
import functools
import hashlib
import itertools
import operator
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.infer.cli.prompts_and_answers import to_json, to_prompt, with_answer_length
from qwen2_jax.infer.engine.sampling_params import NOT_FINITE, SETTABLE
from qwen2_jax.parallel.hosts import Group

if TYPE_CHECKING:
    from qwen2_jax.infer.detokenize import Generation
    from qwen2_jax.infer.engine.programs import CheckedRequest
    from qwen2_jax.infer.lm import LM

ALLOWED = ("prompt", "messages", "tools", "id", *SETTABLE)  # keys of an input line


class Lines:
    """The input, and the output with the answers of an earlier run.

    output None: answers go to standard output, and nothing can be resumed.
    Raises UserError or OSError when the input cannot be read, or the output cannot be written or has other contents.
    """

    def __init__(self, source: Path, output: Path | None):
        self.source, self.output = source, output
        check_paths(source, output)
        self.done: dict[int, str] = {}  # number of an answered input line -> its digest
        if output is not None:
            self._resume(output)
        for _ in self.todo() if self.done else ():  # raises where an earlier answer is to another line
            pass

    def todo(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, bytes) of the input's lines that have no answer yet; blank lines are skipped."""
        with self.source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                answered = self.done.get(number)
                if answered is not None and answered != digest(line):
                    raise UserError(
                        f"{self.output} holds an answer to another line {number} than {self.source} has; "
                        "choose another --output, or remove that file to start over"
                    )
                if answered is None and line.strip():
                    yield number, line

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends answers and returns when they are on disk."""
        text = "".join(to_json(record) + "\n" for record in records)
        if self.output is None:
            print(text, end="", flush=True)
            return
        with self.output.open("ab") as file:
            file.write(text.encode())
            file.flush()
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or a device has no disk
                os.fsync(file.fileno())

    def _resume(self, output: Path) -> None:
        with output.open("ab"):  # makes the file; raises here where that is not allowed
            pass
        if not output.is_file():  # a pipe or a device: there is nothing to resume
            return
        self._read(output)
        if unfinished := unfinished_answer(output):
            with output.open("r+b") as file:  # an answer cut in half by an interruption is computed again
                file.truncate(output.stat().st_size - len(unfinished))

    def _read(self, path: Path) -> None:
        """Notes the complete answers in a file.

        Raises UserError for a file with anything else but the beginning of one more answer to a line of the input.
        """
        count = 0
        for count, (_, _, number, found) in enumerate(read_answers(path), start=1):  # noqa: B007
            self.done[number] = found
        if (unfinished := unfinished_answer(path)) and not self._begins_an_answer(unfinished):
            raise UserError(_foreign(count + 1, path))

    def _begins_an_answer(self, unfinished: bytes) -> bool:
        with self.source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                with contextlib.suppress(UserError):  # such a line has no answer
                    begins = to_json(_head(_parsed(line), number, line)).encode()[:-1] + b', "text": "'
                    if begins.startswith(unfinished) or unfinished.startswith(begins):
                        return True
        return False


def check_paths(source: Path, output: Path | None) -> None:
    """Raises UserError or OSError when the input cannot be read or is the output."""
    if not source.exists():
        raise UserError(f"--input {source} does not exist")
    if source.is_dir():
        raise UserError(f"--input {source} is a folder; give a file of JSON lines")
    if output is not None and output.exists() and output.samefile(source):
        raise UserError(f"--input and --output are the same file, {source}")
    source.open("rb").close()


def read_answers(path: Path) -> Iterator[tuple[int, int, int, str]]:
    """(first byte, bytes, input line, digest of that line) of each complete answer in a file.

    Raises UserError where a line is something else.
    """
    with path.open("rb") as file:
        first = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_json_object(line, "it")
            except UserError:
                record = {}
            answered, found = record.get("line"), record.get("digest")
            if type(answered) is not int or not isinstance(found, str):
                raise UserError(_foreign(number, path))
            yield first, len(line), answered, found
            first += len(line)


def unfinished_answer(path: Path) -> bytes:
    """The bytes after the last newline of a file of answers."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        kept = b""
        while b"\n" not in kept and len(kept) < end:
            start = max(0, end - 2 * len(kept) - 4096)
            file.seek(start)
            kept = file.read(end - start)
    return kept[kept.rfind(b"\n") + 1 :]


def _foreign(number: int, path: Path) -> str:
    return f"line {number} of {path} is not an answer of an earlier run; choose another --output"


def answer(
    lm: "LM",
    lines: Lines,
    given: Mapping[str, Any],
    *,
    system: str | None = None,
    raw: bool = False,
    group: Group | None = None,
) -> int:
    """Answers every line that has no answer yet, a batch at a time. Returns the exit code: 1 if any line failed.

    given: sampling parameters for lines that do not give their own. group: the processes that answer the file
    together, of which the first reports progress.
    """
    group = group or Group()
    say = functools.partial(print, file=sys.stderr) if group.first else lambda text: None
    if lines.done:
        say(f"{len(lines.done)} lines are answered already; resuming")
    failed, answered, tokens, begin = 0, 0, 0, time.perf_counter()
    for some in itertools.batched(lines.todo(), lm.max_rows):
        group.at(f"answering line {some[0][0]}")
        asked: list[tuple[dict[str, Any], CheckedRequest]] = []
        refused: list[tuple[int, UserError]] = []
        for number, line in some:
            try:
                data = _parsed(line)
                asked.append((_head(data, number, line), _request(lm, data, given, system, raw)))
            except UserError as error:
                refused.append((number, error))
        start = time.perf_counter()
        generations = _run(lm, [request for _, request in asked])
        timings = {"batch_s": round(time.perf_counter() - start, 4), "batch_rows": len(asked)}
        records: list[dict[str, Any]] = []
        for (head, request), generation in zip(asked, generations, strict=True):
            if isinstance(generation, UserError):
                refused.append((head["line"], generation))
                continue
            tokens += len(generation.token_ids)
            records.append({
                **head,
                "text": generation.text,
                "token_ids": generation.token_ids,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": len(request.tokens),
                "timings": timings,
            })  # fmt: skip
        for number, why in sorted(refused, key=operator.itemgetter(0)):
            print(f"error: line {number} of {lines.source}: {' '.join(str(why).split())}", file=sys.stderr)
        failed += len(refused)
        if records:
            lines.write(records)
            answered += len(records)
            say(f"{answered} answered, {tokens / (time.perf_counter() - begin):.1f} tokens/s")
    say(f"done: {answered} answered, {len(lines.done)} answered before, {failed} failed")
    return 1 if failed else 0


def digest(line: bytes) -> str:
    """Ties an answer to the line it answers."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def _run(lm: "LM", requests: "Sequence[CheckedRequest]") -> "Sequence[Generation | UserError]":
    """The answer to each request, or why there is none: a batch that does not fit is tried again row by row."""
    from qwen2_jax.infer.detokenize import not_finite

    if not requests:
        return []
    try:
        generations = lm.run(requests)
    except UserError as error:
        if len(requests) == 1:
            return [error]
        return [outcome for request in requests for outcome in _run(lm, [request])]
    return [UserError(not_finite(g)) if g.finish_reason == NOT_FINITE else g for g in generations]


def _parsed(line: bytes) -> dict[str, Any]:
    """The object of one input line. Raises UserError where there is none with the keys that are allowed."""
    data = parse_json_object(line, "it")
    if ("prompt" in data) == ("messages" in data):
        raise UserError('it must be an object with either "prompt" or "messages"')
    if unknown := data.keys() - set(ALLOWED):
        raise UserError(f"unknown {validate.short(', '.join(sorted(unknown)))}; allowed are {', '.join(ALLOWED)}")
    return data


def _head(data: Mapping[str, Any], number: int, line: bytes) -> dict[str, Any]:
    """The first fields of the answer to an input line. Raises UserError for an id that cannot be written back."""
    head = {"id": data["id"]} if "id" in data else {}
    try:
        to_json(head)
    except ValueError:
        raise UserError('"id" holds NaN or an infinite number, which JSON has not') from None
    return {**head, "line": number, "digest": digest(line)}


def _request(
    lm: "LM", data: Mapping[str, Any], given: Mapping[str, Any], system: str | None, raw: bool
) -> "CheckedRequest":
    """The request of one input line. Raises UserError that says what is wrong with it."""
    if "messages" in data:
        prompt, chat = data["messages"], True
        if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
            raise UserError('"messages" must be a list of objects with "role" and "content"')
        if system and prompt[0].get("role") not in ("system", "developer"):
            prompt = [{"role": "system", "content": system}, *prompt]
    else:
        prompt = data["prompt"]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            raise UserError('"prompt" must be text or token ids; conversations go into "messages"')
        if isinstance(prompt, str) and prompt:
            prompt = to_prompt(lm, prompt, system=system, raw=raw)
        chat = isinstance(data["prompt"], str) and isinstance(prompt, list) and isinstance(prompt[0], dict)
    own = {name: data[name] for name in SETTABLE if name in data}
    return lm.request(prompt, data.get("tools"), **with_answer_length(lm, {**given, **own}, chat=chat))
