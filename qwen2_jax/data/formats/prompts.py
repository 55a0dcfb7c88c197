# SPDX-License-Identifier: Apache-2.0
"""Prompts to sample completions for, with the columns that reward functions need.

    {"prompt": "What is 2 + 3?", "answer": "5"}                         a string is one user message
    {"prompt": [{"role": "user", "content": "..."}], "level": 3}        or a list of messages, as verl has it
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}   a final answer is not part of the prompt

Every other field is a column, passed to reward functions by name. A final answer of a conversation becomes the
column `answer`, and verl's reward_model.ground_truth the column `ground_truth`.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax import validate
from qwen2_jax.data.formats import messages
from qwen2_jax.data.sources.files import library
from qwen2_jax.data.sources.records import open_records
from qwen2_jax.data.spec import PromptData
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """messages: up to the last user turn. ids: tokens of the rendered chat template with the generation prompt."""

    messages: list[dict[str, Any]]
    ids: list[int]
    columns: dict[str, Any]


class Prompts:
    """The prompts of a run. `batch` n is a function of (data, seed, n), so a run can resume at any batch."""

    def __init__(self, data: PromptData, tokenizer: Tokenizer, *, seed: int, cache: Path):
        """Reads and tokenises everything. Raises UserError with file and line for a record without a prompt."""
        self.data = data
        self._prompts: list[Prompt] = []
        self._report: list[dict[str, Any]] = []
        for path in data.sources:
            records = open_records(path, cache)
            read = [_read(records[i], records.where(i), tokenizer) for i in range(len(records))]
            short = [prompt for prompt in read if len(prompt.ids) <= data.max_tokens]
            self._prompts += short
            self._report.append({"source": path, "records": len(read), "dropped": len(read) - len(short)})
        if not self._prompts:
            raise UserError(
                f"all prompts of {', '.join(data.sources)} have more than max_tokens={data.max_tokens} tokens; raise it"
            )
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # as loader.py: grain takes seed + epoch
        self._order = self._ordered(range(len(self._prompts)), shuffled=True)

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, number: int, size: int) -> list[Prompt]:
        """`size` prompts; one pass over all of them after the other, each in an order of its own."""
        return [self._prompts[self._order[i]] for i in range(number * size, (number + 1) * size)]

    def first(self, count: int) -> list[Prompt]:
        """The first prompts, in file order."""
        return self._prompts[:count]

    def subset(self, numbers: Sequence[int], *, as_given: bool) -> "Prompts":
        """These prompts only, shuffled, or in the order given in every pass."""
        fewer = copy.copy(self)
        fewer._order = self._ordered(numbers, shuffled=not as_given)
        return fewer

    def _ordered(self, numbers: Sequence[int], *, shuffled: bool) -> Any:
        order = library("grain", "training").MapDataset.source(list(numbers))
        return (order.shuffle(seed=self._seed) if shuffled else order).repeat()

    def report(self) -> list[dict[str, Any]]:
        """One dict per source: records, and how many were dropped because they are too long."""
        return self._report

    @property
    def identity(self) -> list[str]:
        """A digest of all prompts; a resumed run must have the same."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(json.dumps([prompt.ids, prompt.columns], default=str).encode() + b"\n")
        return [digest.hexdigest()[:32]]


def _read(record: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Prompt:
    columns = {name: value for name, value in record.items() if name not in ("prompt", "messages")}
    record = messages.without_filled_nulls(record)
    if record.get("prompt") is not None:
        chat = messages.side(record, "prompt", "user", where)
    elif record.get("messages") is not None:
        chat = messages.messages(record, "messages", where)
    else:
        raise UserError(
            f"{where} has the fields {messages.fields(record)}; a prompt needs the field prompt or messages"
        )
    chat = messages.opening(record, where) + chat
    messages.check_conversation(chat, where)
    asked = chat.messages
    if asked[-1]["role"] == "assistant":
        columns.setdefault("answer", asked[-1]["content"])
        asked = asked[:-1]
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{where}: the prompt ends with {_role(asked)}; it must end with what the user said")
    judge = columns.get("reward_model")
    if isinstance(judge, Mapping) and "ground_truth" in judge:
        columns.setdefault("ground_truth", judge["ground_truth"])
    if taken := {"prompts", "completions", "completion_ids"} & columns.keys():
        raise UserError(f"{where}: reward functions know {', '.join(sorted(taken))} as something else; rename it")
    try:
        return Prompt(asked, tokenizer.chat_ids(asked, tools=chat.tools), columns)
    except UserError as why:
        raise UserError(f"{where}: {why}") from why


def _role(asked: Sequence[Mapping[str, Any]]) -> str:
    return f"a message of role {validate.short(asked[-1]['role'])}" if asked else "nothing"
