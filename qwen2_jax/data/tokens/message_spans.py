# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation lie in which message, whatever its chat template is.

The conversation is rendered up to a message and up to that message's end; both must be the beginning of the whole
text, and the difference is the message. Only text is rendered again: of a part's tokens, those up to its last special
token are the whole's. Rendering is quadratic in messages, so answers times messages are bounded.
"""

import functools
import itertools

import numpy as np

from qwen2_jax.data.formats.messages import Chat
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer

MOST = 1_000_000  # of messages whose places are asked for, times messages: about a minute of rendering


class MessageSpans:
    """tokens: the conversation's ids, equal to `tokenizer.chat_ids(messages, add_generation_prompt=False)`."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat):
        self.tokenizer = tokenizer
        self.chat = chat
        self._marked, self._tools, self._mark = tokenizer.mark_special(chat.messages, chat.tools)
        self._text = self._rendered(len(chat.messages), prompt=False)
        self.tokens = tokenizer.ids_of_marked(self._text, self._mark)
        self._asked = 0

    def span(self, i: int, *, prompt: bool) -> slice:
        """The tokens that lie wholly in message i; prompt: without the generation prompt that an answer begins with.

        Raises UserError where the template does not show which they are.
        """
        self._asked += 1
        if self._asked * len(self.chat.messages) > MOST:
            raise UserError(
                f"of {len(self.chat.messages):,} messages more than {self._asked - 1:,} are to be told apart by a chat "
                "template that is not ChatML, which takes too long; cut the conversation, or use "
                "targets='last_assistant'"
            )
        start, stop = self._bytes_before(i, prompt), self._bytes_before(i + 1, prompt=False)
        return slice(
            int(np.searchsorted(self._ends, start)) + 1 if start else 0,
            int(np.searchsorted(self._ends, stop, side="right")),
        )

    def _rendered(self, i: int, prompt: bool) -> str:
        return self.tokenizer.chat_templates.render(self._marked[:i], self._tools, prompt)

    @functools.cached_property
    def _bytes(self) -> bytes:
        return self._bytes_of(self.tokens)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """For each token, the bytes up to its end."""
        return np.cumsum([len(self.tokenizer.token_bytes(token, False)) for token in self.tokens])

    @functools.cached_property
    def _special(self) -> tuple[list[int], list[int], list[int]]:
        """Of every special token: where its text begins and ends in the whole, and the bytes before it."""
        found = self.tokenizer.special_matches(self._text)
        places = [place for place, token in enumerate(self.tokens) if token in self.tokenizer.special_ids]
        if len(places) != len(found):  # a token that is one beside blanks or words only
            return [], [], []
        before = [int(self._ends[place - 1]) if place else 0 for place in places]
        return [match.start() for match in found], [match.end() for match in found], before

    def _bytes_before(self, i: int, prompt: bool) -> int:
        """Length in bytes of messages[:i] as rendered, which must be the beginning of the whole text."""
        if i == 0 and not prompt:
            return 0
        if i == 0:
            raise UserError(
                "messages[0] is the assistant's, but this chat template does not show where it begins; let a user begin"
            )
        part = self._rendered(i, prompt)
        if self._text.startswith(part):
            starts, ends, before = self._special
            k = int(np.searchsorted(ends, len(part), side="right")) - 1
            start, offset = (starts[k], before[k]) if k >= 0 else (0, 0)
            rest = self._bytes_of(self.tokenizer.ids_of_marked(part[start:], self._mark))
            if self._bytes.startswith(rest, offset):
                return offset + len(rest)
        what = "its generation prompt is not how an answer begins" if prompt else "it changes them when more follow"
        raise UserError(
            f"the chat template does not write messages[:{i}] as the beginning of the whole ({what}), so it cannot "
            f"be told which tokens are answers; use targets='last_assistant' or 'all', or a ChatML template"
        )

    def _bytes_of(self, tokens: list[int]) -> bytes:
        return b"".join(map(self.tokenizer.token_bytes, tokens, itertools.repeat(False)))
