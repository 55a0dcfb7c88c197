# SPDX-License-Identifier: Apache-2.0
"""One answer while its tokens arrive: text without half characters, cut before a stop text."""

import bisect
import dataclasses
from collections.abc import Sequence

from qwen2_jax.infer.engine.programs import Decoding, reason
from qwen2_jax.infer.engine.sampling_params import Settings
from qwen2_jax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a prompt was continued with.

    text: the answer; empty where there is no tokenizer. token_ids: its tokens, an end-of-sequence token included; at a
    stop text they end with the token that completes the text before it. logprobs: log p of each token in nats under
    the model itself (log-softmax of the raw logits, no temperature or filter).
    finish_reason: "stop" (end-of-sequence token or stop text) or "length" (max_new_tokens or the context is used up).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Answer:
    """Collects tokens of one row. `reason` is empty until the answer is complete."""

    def __init__(self, tokenizer: Tokenizer | None, settings: Settings):
        self.settings = settings
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._text = ""  # decoded so far
        self._shown = 0  # characters of it handed out
        self._ends: list[int] = []  # length of the text after each token

    def add(self, token: int, logprob: float) -> str:
        """Takes the next token and returns the text that is now certain: what no stop text can still take back."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self._decoder is not None and not self._is_end(token):
            self._text += self._decoder.push(token)
        self._ends.append(len(self._text))
        return self._show(final=False)

    def finish(self, reason: str) -> str:
        """Ends the answer for `reason`, or for a stop text that its last characters complete. Returns the last text."""
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
        return not self.settings.ignore_eos and token in self.settings.eos_ids

    def _show(self, final: bool) -> str:
        stops, start = self.settings.stop, self._shown
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


def advance(decoding: Decoding, answers: Sequence[Answer], steps: int) -> list[str]:
    """One call of the device loop: adds its tokens to the answers and returns the text that each gained."""
    cancel = [row for row, answer in enumerate(answers) if answer.reason and not decoding.finished[row]]
    pieces = []
    for row, (answer, new) in enumerate(zip(answers, decoding.advance(steps, cancel), strict=True)):
        gained = [answer.add(token, value) for token, value in new if not answer.reason]
        if decoding.finished[row] and not answer.reason:
            gained.append(answer.finish(reason(answer.settings, answer.token_ids)))
        pieces.append("".join(gained))
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
