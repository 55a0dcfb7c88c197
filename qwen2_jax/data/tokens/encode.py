# SPDX-License-Identifier: Apache-2.0
"""Encodes documents as token ids with a target flag for each. loss_mask.py has the rule for conversations.

A conversation's ids are exactly `tokenizer.chat_ids(messages, add_generation_prompt=False)`. The
positions of the answers are derived from the rendered chat template, in one of two ways:

ChatML, Qwen2's template and its like. If the rendered text is <|im_start|>ROLE, newline, CONTENT, <|im_end|>, newline
for every message, the pieces between the special tokens are encoded one by one: which are targets is then known.

Any other template. The conversation is also rendered up to an answer, with the generation prompt, and up to the
answer's end; the difference is the answer (message_spans.py). Both must be prefixes of the whole text, or UserError is
raised.

Text that spells a special token is encoded as ordinary text, in plain documents too.

A ranking is one document: its conversations one after another, the best response's first, each with the prompt.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from qwen2_jax import validate
from qwen2_jax.conversation import ROLES
from qwen2_jax.data.formats.record_formats import Chat, Document, Ranking, Text
from qwen2_jax.data.tokens.loss_mask import Targets, trained_answers, turn_loss_mask
from qwen2_jax.data.tokens.message_spans import MessageSpans
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer

PIECE = 1 << 17  # characters of a long text encoded at once
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's message, beside its content
TOGETHER = 8  # pieces encoded together: the library needs more than 100 bytes per character
# Qwen2's pre-tokenisation ends a word behind each run of newlines, whatever follows, so ids do not change if a text is
# cut there: before a character that is no white space and neither combines with anything (NFC) before it.
CUT = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class Encoded:
    """A document's token ids and, for each, whether it is a target. Its length is the number of tokens.

    begins: of a ranking, for each token whether one of its sequences begins there.
    """

    tokens: list[int]
    is_target: list[bool]
    begins: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Encoder:
    """Encodes documents. A message whose `train` flag is off has no targets, whatever `targets` says.

    A text ends with <|endoftext|>, and all its tokens are targets. A conversation without answers has no targets under
    "assistant", "assistant_newline" and "last_assistant"; the caller skips it. In a ranking only responses have
    targets, so "turns_qwen1" and "all" raise UserError.
    """

    def __init__(self, tokenizer: Tokenizer, targets: Targets = "assistant"):
        validate.choice("targets", targets, get_args(Targets))
        self.tokenizer = tokenizer
        self.targets = targets

    def encode(self, document: Document) -> Encoded:
        return self.encode_batch([document])[0]

    def encode_batch(self, documents: Sequence[Document]) -> list[Encoded]:
        """`encode` of many documents on all cores."""
        parts: list[list[Text | Chat]] = [
            self._chats(document) if isinstance(document, Ranking) else [document] for document in documents
        ]
        encoded = iter(self._encode_parts(list(itertools.chain.from_iterable(parts))))
        return [
            _laid_out(list(itertools.islice(encoded, len(some)))) if isinstance(document, Ranking) else next(encoded)
            for document, some in zip(documents, parts, strict=True)
        ]

    def _chats(self, ranking: Ranking) -> list[Text | Chat]:
        if self.targets in ("turns_qwen1", "all"):
            raise UserError(
                f"targets {self.targets!r} are also tokens of the prompt, and of a ranking only responses are targets; "
                "give 'assistant', 'assistant_newline' or 'last_assistant'"
            )
        return [*ranking.chats]

    def _encode_parts(self, documents: Sequence[Text | Chat]) -> list[Encoded]:
        turns = [None if isinstance(document, Text) else self._turns(document) for document in documents]
        texts: list[str] = []
        for document, parts in zip(documents, turns, strict=True):
            if isinstance(document, Text):
                if not self._in_pieces(document):
                    texts.append(document.text)
            elif parts is not None:
                texts += map(_body, parts.messages)
        ids = iter(self._parts(texts))
        encoded = []
        for document, parts in zip(documents, turns, strict=True):
            if isinstance(document, Text):
                tokens = self._long(document.text) if self._in_pieces(document) else next(ids)
                before, after = self.tokenizer.added_around
                end = self._end_of_text
                tokens = [*before, *tokens, *after, *([end] if after[-1:] != [end] else [])]
                encoded.append(Encoded(tokens, [True] * len(tokens)))
            elif parts is not None:
                encoded.append(self._join(parts, ids))
            else:
                encoded.append(self._by_prefixes(document))
        return encoded

    def _parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of parts of documents; what spells a special token is ordinary text."""
        return self.tokenizer.encode_batch(texts, allow_special=False, add_special_tokens=False)

    def _in_pieces(self, document: Text) -> bool:
        return len(document.text) > PIECE * TOGETHER and self._may_cut

    def _long(self, text: str) -> list[int]:
        """Ids of a long text, a few pieces at a time."""
        ids: list[int] = []
        for some in itertools.batched(_pieces(text), TOGETHER):
            ids += itertools.chain.from_iterable(self._parts(some))
        return ids

    @functools.cached_property
    def _may_cut(self) -> bool:
        """Whether this tokenizer splits text as Qwen2's does, and has no added token that spans a newline."""
        added = [token for token in json.loads(self.tokenizer.to_json())["added_tokens"] if not token["special"]]
        greedy = any(token["lstrip"] or token["rstrip"] or "\n" in token["content"] for token in added)
        return self.tokenizer.splits_as_qwen2 and not greedy

    @functools.cached_property
    def _end_of_text(self) -> int:
        return self._special(END_OF_TEXT)

    def _special(self, name: str) -> int:
        found = self.tokenizer.token_id(name)
        if found is None or found not in self.tokenizer.special_ids:
            raise UserError(f"this tokenizer has no special token {name}; use one made for Qwen2")
        return found

    # ChatML

    @functools.cached_property
    def _default_system(self) -> list[dict[str, Any]] | None:
        """The system message that a ChatML template adds to a conversation without one, or []; None: not ChatML."""
        if not {IM_START, IM_END} <= {self.tokenizer.decode([i], False) for i in self.tokenizer.special_ids}:
            return None
        probe = [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "\n b"}]
        try:
            rendered = self.tokenizer.render_chat(probe, add_generation_prompt=False)
            prompt = self.tokenizer.render_chat(probe, add_generation_prompt=True)
        except UserError:
            return None
        before, turns, after = rendered.partition(_chatml(probe))
        if not turns or after or prompt != f"{rendered}{IM_START}assistant\n":
            return None
        content = before.removeprefix(f"{IM_START}system\n").removesuffix(f"{IM_END}\n")
        system = [{"role": "system", "content": content}] if before else []
        if _chatml(system) != before or IM_START in content or IM_END in content:
            return None
        bodies = self._parts([*map(_body, [*system, *probe])])
        joined = self._join(Chat([*system, *probe], [True] * (len(system) + len(probe))), iter(bodies))
        # Differs if a special token strips the white space next to it.
        return system if joined.tokens == self.tokenizer.chat_ids(probe, add_generation_prompt=False) else None

    def _turns(self, chat: Chat) -> Chat | None:
        """The conversation with the template's system message, if the template writes this one as ChatML."""
        for i, message in enumerate(chat.messages):
            for key in THOUGHTS:
                if message.get(key) and not self.tokenizer.chat_templates.writes(key):
                    raise UserError(
                        f"messages[{i}] has {key}, which this tokenizer's chat template leaves out; write it into the "
                        "content, or remove it"
                    )
        if self._default_system is None:
            return None
        added = self._default_system if chat.messages[0]["role"] != "system" else []
        messages = [*added, *chat.messages]
        if self.tokenizer.render_chat(chat.messages, add_generation_prompt=False, tools=chat.tools) != _chatml(
            messages
        ):
            return None
        return Chat(messages, [*[True] * len(added), *chat.train], chat.tools)

    def _join(self, chat: Chat, bodies: Iterator[list[int]]) -> Encoded:
        """bodies: ids of each turn's role, newline and content."""
        start, end, newline = self._frame
        answers = trained_answers(self.targets, chat.messages)
        tokens: list[int] = []
        is_target: list[bool] = []
        for i, (message, train) in enumerate(zip(chat.messages, chat.train, strict=True)):
            body = next(bodies)
            head = self._head(message["role"], body)
            tokens += [start, *body, end, *newline]
            if train:
                is_target += turn_loss_mask(
                    self.targets, answer=i in answers, head=head, content=len(body) - head, newline=len(newline)
                )
            else:
                is_target += [False] * (2 + len(body) + len(newline))
        return Encoded(tokens, is_target)

    def _head(self, role: str, body: list[int]) -> int:
        """How many tokens at the start of a turn hold its role and the newline.

        Content that begins with newlines shares a token with that newline. The token belongs to the head: after a
        generation prompt, which ends with a newline, the model never produces it.
        """
        head = self._heads[role]
        if body[: len(head)] == head:
            return len(head)
        ends = itertools.accumulate(len(self.tokenizer.token_bytes(token, False)) for token in body)
        return 1 + next(k for k, end in enumerate(ends) if end > len(role))

    @functools.cached_property
    def _frame(self) -> tuple[int, int, list[int]]:
        return self._special(IM_START), self._special(IM_END), self._parts(["\n"])[0]

    @functools.cached_property
    def _heads(self) -> dict[str, list[int]]:
        return {role: self._parts([f"{role}\n"])[0] for role in ROLES}

    # Any template

    def _by_prefixes(self, chat: Chat) -> Encoded:
        if self.targets == "turns_qwen1":
            raise UserError(
                "targets 'turns_qwen1' needs a ChatML template, and this tokenizer's is another; use 'assistant'"
            )
        spans = MessageSpans(self.tokenizer, chat)
        tokens = spans.tokens
        is_target = np.full(len(tokens), self.targets == "all")
        if self.targets == "all":
            for i in (i for i, train in enumerate(chat.train) if not train):
                is_target[spans.span(i, prompt=False)] = False
            return Encoded(tokens, is_target.tolist())
        for i in trained_answers(self.targets, chat.messages):
            if chat.train[i]:
                span = spans.span(i, prompt=True)
                special = [k for k in range(span.start, span.stop) if tokens[k] in self.tokenizer.special_ids]
                if special and self.targets != "assistant_newline":
                    span = slice(span.start, special[-1] + 1)  # up to the token that ends the turn
                is_target[span] = True
        return Encoded(tokens, is_target.tolist())


def _laid_out(sequences: Sequence[Encoded]) -> Encoded:
    """Concatenates the sequences of a ranking."""
    flat = itertools.chain.from_iterable
    return Encoded(
        [*flat(one.tokens for one in sequences)],
        [*flat(one.is_target for one in sequences)],
        [*flat((i == 0 for i in range(len(one))) for one in sequences)],
    )


def _body(message: dict[str, Any]) -> str:
    return f"{message['role']}\n{message['content']}"


def _pieces(text: str) -> Iterable[str]:
    """The text in parts of about PIECE characters, cut where CUT allows it."""
    start = 0
    while found := CUT.search(text, start + PIECE):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _chatml(messages: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{IM_START}{_body(message)}{IM_END}\n" for message in messages)
