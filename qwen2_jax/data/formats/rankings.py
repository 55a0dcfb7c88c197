# SPDX-License-Identifier: Apache-2.0
"""Parses ranked responses to one prompt, best first: the data of preference training.

    preference        {"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or a list of messages
    ranked            {"prompt": "...", "responses": ["...", "...", "..."], "scores": [9, 7.5, 2]}
    sharegpt_ranking  {"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}
    alpaca_ranking    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}, or with
                      "output": ["...", "..."], the best first; system and history as in alpaca

preference: without a prompt, or if chosen and rejected are lists that repeat it, both are whole conversations and their
common prefix up to an answer is the prompt. ranked: best response first, or sorted by scores, higher is better; of
responses with equal scores only the first is kept, because they have no order, and the others are counted. Answers
within a prompt are not targets. Each may also have "system" and "tools" (record_formats.py).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_jax import validate
from qwen2_jax.data.formats import messages
from qwen2_jax.data.formats.messages import Chat
from qwen2_jax.errors import UserError

PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Ranking:
    """The messages of a prompt and two or more responses to it, best first.

    tied: how many more responses the record has, left out because another one has the same score.
    """

    prompt: list[dict[str, Any]]
    responses: list[Chat]
    tools: messages.Tools | None = None
    tied: int = 0

    @property
    def chats(self) -> list[Chat]:
        """The prompt, which is not trained, followed by each response."""
        asked = Chat(self.prompt, [False] * len(self.prompt), self.tools)
        return [asked + response for response in self.responses]


def _preference(record: Mapping[str, Any], where: str) -> Ranking:
    sides = [messages.side(record, field, "assistant", where) for field in PAIR]
    whole = [side.messages[0]["role"] != "assistant" for side in sides]
    if record.get("prompt") is None:
        if not all(whole):
            raise UserError(
                f"{where}: no prompt, and {PAIR[whole.index(False)]} does not begin with one; give a prompt, or whole "
                "conversations as lists of messages in both chosen and rejected"
            )
        return _common_prompt(sides, where)
    prompt = messages.side(record, "prompt", "user", where)
    if not any(whole):
        return _ranking(prompt.messages, sides, PAIR, where)
    for field, side in zip(PAIR, sides, strict=True):
        if side.messages[: len(prompt.messages)] != prompt.messages:
            raise UserError(
                f"{where}: {field} begins with a message of role {side.messages[0]['role']!r} but not with the prompt; "
                "let it hold the answer alone, or leave prompt out"
            )
    return _common_prompt(sides, where)


def _common_prompt(sides: Sequence[Chat], where: str) -> Ranking:
    """The ranking of two whole conversations, which must be equal up to an answer."""
    chosen, rejected = (side.messages for side in sides)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = min(sum(1 for _ in alike), len(chosen) - 1, len(rejected) - 1)
    for field, side in zip(PAIR, sides, strict=True):
        if side.messages[shared]["role"] != "assistant":
            raise UserError(
                f"{where}: the prompts of chosen and rejected differ: they must be equal up to an answer, but "
                f"{field}[{shared}] has the role {side.messages[shared]['role']!r}; give answers to the same prompt"
            )
    return _ranking(chosen[:shared], [Chat(s.messages[shared:], s.train[shared:]) for s in sides], PAIR, where)


def _ranked(record: Mapping[str, Any], where: str) -> Ranking:
    prompt = messages.side(record, "prompt", "user", where)
    responses, names = _responses(record, "responses", where)
    given = len(responses)
    if record.get("scores") is not None:
        scores = _scores(record, len(responses), where)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable
        kept = [a for a, b in zip(order, [None, *order], strict=False) if b is None or scores[a] != scores[b]]
        if len(kept) < 2 <= len(responses):
            raise UserError(
                f"{where}: all {len(scores)} scores are {scores[0]:g}, which ranks nothing; leave the record out, or "
                "leave scores out if the responses stand best first"
            )
        responses, names = [responses[i] for i in kept], [names[i] for i in kept]
    ranking = _ranking(prompt.messages, responses, names, where)
    return dataclasses.replace(ranking, tied=given - len(responses))


def _scores(record: Mapping[str, Any], count: int, where: str) -> Sequence[float]:
    scores = messages.listed(record, "scores", where, "number")
    if len(scores) != count:
        raise UserError(f"{where}: {len(scores)} scores for {count} responses; give one for each")
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"{where}: scores[{i}] is {validate.short(score)}; it must be a finite number")
    return scores


def _sharegpt(record: Mapping[str, Any], where: str) -> Ranking:
    prompt = messages.turns(record, "conversations", where)
    turns = [messages.turns({field: [record.get(field)]}, field, where) for field in PAIR]
    return _ranking(prompt.messages, turns, PAIR, where)


def _alpaca(record: Mapping[str, Any], where: str) -> Ranking:
    prompt = messages.question(record, where)
    if record.get("output") is not None:
        return _ranking(prompt.messages, *_responses(record, "output", where), where)
    responses = [messages.side(record, field, "assistant", where) for field in PAIR]
    return _ranking(prompt.messages, responses, PAIR, where)


def _responses(record: Mapping[str, Any], field: str, where: str) -> tuple[list[Chat], list[str]]:
    """The responses in the field's list, and a name for each."""
    given = messages.listed(record, field, where, "response")
    names = [f"{field}[{i}]" for i in range(len(given))]
    named = dict(zip(names, given, strict=True))
    return [messages.side(named, name, "assistant", where) for name in names], names


def _ranking(prompt: list[dict[str, Any]], responses: Sequence[Chat], names: Sequence[str], where: str) -> Ranking:
    """names: of the responses in the record, for errors."""
    if len(responses) < 2:
        raise UserError(f"{where}: one response ({names[0]}); a ranking needs two or more, the best first")
    if not prompt or prompt[-1]["role"] == "assistant":
        found = "ends with the assistant's message" if prompt else "is empty"
        raise UserError(f"{where}: the prompt {found}; it must end with what the responses answer")
    for name, response in zip(names, responses, strict=True):
        first, last = response.messages[0], response.messages[-1]
        if first["role"] != "assistant" or last["role"] != "assistant":
            other = first if first["role"] != "assistant" else last
            raise UserError(
                f"{where}: {name} has a message of role {other['role']!r} at its {'start' if other is first else 'end'}"
                "; a response begins and ends with the assistant's"
            )
        if all(map(messages.is_empty, response.messages)):
            raise UserError(f"{where}: {name} is empty; give an answer, or leave the record out")
        if messages.is_empty(last):
            raise UserError(f"{where}: {name} ends with an empty message; give the answer, or leave the record out")
        if not response.train[-1]:
            raise UserError(f"{where}: the last message of {name} is not to be trained; leave its train or weight out")
        messages.check_conversation(Chat(prompt, []) + Chat(response.messages, []), where)
    for (a, first_), (b, second) in itertools.combinations(zip(names, responses, strict=True), 2):
        if first_.messages == second.messages:
            raise UserError(f"{where}: {a} equals {b}, which prefers nothing; leave the record out")
    return Ranking(prompt, list(responses))


READERS: dict[str, Callable[[Mapping[str, Any], str], Ranking]] = {
    "preference": _preference,
    "ranked": _ranked,
    "sharegpt_ranking": _sharegpt,
    "alpaca_ranking": _alpaca,
}


def read(record: Mapping[str, Any], format: str, where: str) -> Ranking:
    """Parses a record in one of the formats of READERS, with its fields system and tools."""
    ranking = READERS[format](record, where)
    opening = messages.opening(record, where)
    prompt = opening.messages + ranking.prompt
    messages.check_conversation(Chat(prompt, []), where)
    return dataclasses.replace(ranking, prompt=prompt, tools=opening.tools)
