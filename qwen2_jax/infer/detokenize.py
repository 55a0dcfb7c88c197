# SPDX-License-Identifier: Apache-2.0
"""Tokens of one answer to text as they arrive: no incomplete characters, cut before a stop text."""

import bisect
import dataclasses
from collections.abc import Sequence

from qwen2_jax.infer.engine.decode_batch import DecodeBatch
from qwen2_jax.infer.engine.sampling_params import SamplingParams, finish_reason
from qwen2_jax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to a prompt.

    text: the answer; empty where there is no tokenizer. token_ids: its tokens, an end-of-sequence token included; at a
    stop text they end with the token that completes the text before it. logprobs: log p of each token in nats under
    the model itself (log-softmax of the logits, without temperature, filters and penalty).
    finish_reason: "stop" (end-of-sequence token or stop text), "length" (max_new_tokens or the context is used up) or
    "not_finite": the next token's logits are not finite numbers (NaN in the weights, an overflow), or every token is
    barred by the generation_config.json. The answer ends before that token.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def not_finite(answer: Generation) -> str:
    """The message for an answer with finish_reason "not_finite"."""
    return (
        f"the model's logits are not finite numbers at token {len(answer.token_ids) + 1} of the answer: NaN or "
        "infinity in the weights, an overflow of the dtype, or every token barred by generation_config.json; try "
        "dtype='float32', or another copy of the weights"
    )


class IncrementalDetokenizer:
    """Collects the tokens of one row as text. `reason` is empty until the answer is complete."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        self.params = params
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._text = ""  # decoded so far
        self._shown = 0  # characters of it returned so far
        self._ends: list[int] = []  # length of the text after each token

    def add(self, token: int, logprob: float) -> str:
        """Adds a token. Returns the new text that is final: what no stop text can still cut off."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self._decoder is not None and not self._is_end(token):
            self._text += self._decoder.push(token)
        self._ends.append(len(self._text))
        return self._show(final=False)

    def finish(self, reason: str) -> str:
        """Ends the answer for `reason`, or for a stop text in its last characters. Returns the rest of the text."""
        if self._decoder is not None:
            self._text += self._decoder.flush()
            self._ends[-1:] = [len(self._text)] if self._ends else []
        rest = self._show(final=True)
        self.reason = self.reason or reason
        return rest

    def generation(self) -> Generation:
        """The answer so far."""
        text = self._text[: self._shown] if not self.reason else self._text
        return Generation(text, list(self.token_ids), list(self.logprobs), self.reason or "length")

    def _is_end(self, token: int) -> bool:
        return not self.params.ignore_eos and token in self.params.eos_ids

    def _show(self, final: bool) -> str:
        stops, start = self.params.stop, self._shown
        found = min((at for at in (self._text.find(s, start) for s in stops) if at >= 0), default=-1)
        if found >= 0:
            self._cut(found)
        until = len(self._text) if final or found >= 0 else len(self._text) - held_back(self._text[start:], stops)
        self._shown = until
        return self._text[start:until]

    def _cut(self, length: int) -> None:
        """Ends the answer at this many characters, with the fewest tokens that hold them."""
        self._text = self._text[:length]
        count = bisect.bisect_left(self._ends, length) + 1 if length else 0
        del self.token_ids[count:], self.logprobs[count:]
        self.reason = "stop"


def advance(batch: DecodeBatch, answers: Sequence[IncrementalDetokenizer], steps: int) -> list[str]:
    """Calls the decode loop once, adds its tokens to the answers and returns the new text of each."""
    cancel = [row for row, answer in enumerate(answers) if answer.reason and not batch.finished[row]]
    pieces = []
    for row, (answer, new) in enumerate(zip(answers, batch.advance(steps, cancel), strict=True)):
        texts = [answer.add(token, value) for token, value in new if not answer.reason]
        if batch.finished[row] and not answer.reason:
            texts.append(answer.finish(finish_reason(answer.params, answer.token_ids)))
        pieces.append("".join(texts))
    return pieces


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text could be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
