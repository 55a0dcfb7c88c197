# SPDX-License-Identifier: Apache-2.0
"""ChatML as token ids with a loss mask, equal to the chat template followed by the tokenizer."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from qwen2_jax.data.bpe import SYSTEM
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, IM_START


@dataclass
class Sequence:
    """Tokens of one document and, for each, whether it is a prediction target that counts."""

    tokens: list[int]
    is_target: list[bool]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, tokens: list[int], is_target: bool) -> None:
        self.tokens += tokens
        self.is_target += [is_target] * len(tokens)


class ChatEncoder:
    """Encodes turns for one tokenizer. Text never becomes a special token: those are inserted as ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # its own, because of the next line
        self.tokenizer.encode_special_tokens = True  # what looks like a special token in text stays text
        self.start, self.end, self.end_of_text = map(self._special, (IM_START, IM_END, END_OF_TEXT))
        self.newline = self.encode("\n")
        self.assistant = [self.start, *self.encode("assistant\n")]
        self.system = [self.start, *self.encode(f"system\n{SYSTEM}"), self.end, *self.newline]

    def _special(self, name: str) -> int:
        found = self.tokenizer.token_to_id(name)
        if found is None:
            raise UserError(f"this tokenizer has no {name}; chats need a tokenizer with Qwen2's special tokens")
        return found

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def open(self) -> Sequence:
        """A conversation with nothing but the default system line."""
        return Sequence(list(self.system), [False] * len(self.system))

    def prompt(self, question: str) -> list[int]:
        """Ids of one user turn up to and including "assistant" and its newline."""
        return [self.start, *self.encode(f"user\n{question}"), self.end, *self.newline, *self.assistant]

    def turn(self, question: str, answer: str) -> Sequence:
        """One user turn and its answer; the answer and its <|im_end|> are the targets."""
        turn = Sequence([], [])
        turn.add(self.prompt(question), False)
        turn.add([*self.encode(answer), self.end], True)
        turn.add(self.newline, False)
        return turn
