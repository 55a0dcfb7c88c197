# SPDX-License-Identifier: Apache-2.0
"""One answer as it comes: pieces of text from calls of the device loop."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qwen2_jax.infer.detokenize import Answer, Generation
from qwen2_jax.infer.engine.programs import STEPS, Decoding, Progress, Request, reason

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM

SECONDS_PER_PIECE = 0.2  # a stream shows something about this often


class Stream:
    """Iterates over the pieces of one answer. `generation` is complete once the iteration has ended.

    first_seconds: from the first request for a piece to the first token; seconds: to the end. prompt_tokens: int.
    progress: set before iterating to be told about the prefill.
    """

    def __init__(self, lm: "LM", request: Request):
        self._lm, self._request = lm, request
        self._answer = Answer(lm.tokenizer, request.settings)
        self.progress: Progress | None = None
        self.prompt_tokens = len(request.tokens)
        self.first_seconds = self.seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def generation(self) -> Generation:
        """The answer so far; its finish_reason is "length" while it is not complete."""
        return self._answer.generation()

    def _run(self) -> Iterator[str]:
        begin = time.perf_counter()
        decoding = self._lm.generator.start([self._request], self._lm.long_context, self.progress)
        self._answer = Answer(self._lm.tokenizer, decoding.requests[0].settings)
        steps = 1  # the first token is shown as soon as it is there
        while not self._answer.reason:
            before = time.perf_counter()
            piece = advance(decoding, [self._answer], steps)[0]
            now = time.perf_counter()
            self.seconds = now - begin
            self.first_seconds = self.first_seconds or self.seconds
            per_token = (now - before) / steps
            steps = max(1, min(STEPS, int(SECONDS_PER_PIECE / per_token)))
            if piece:
                yield piece


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
