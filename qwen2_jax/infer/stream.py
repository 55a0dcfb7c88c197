# SPDX-License-Identifier: Apache-2.0
"""One answer as it comes: pieces of text from calls of the device loop."""

import time
from collections.abc import Iterator

from qwen2_jax.infer.detokenize import Answer, Generation, advance
from qwen2_jax.infer.engine.programs import STEPS, Generator, Progress, Request
from qwen2_jax.model.rope import LongContext
from qwen2_jax.tokenizer import Tokenizer

SECONDS_PER_PIECE = 0.2  # a stream shows something about this often


class Stream:
    """Iterates over the pieces of one answer. `generation` is complete once the iteration has ended.

    first_seconds: from the first request for a piece to the first token; seconds: to the end. prompt_tokens: int.
    progress: set before iterating to be told about the prefill.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer | None, request: Request, *, long_context: LongContext
    ):
        self._generator, self._tokenizer, self._request = generator, tokenizer, request
        self._long_context = long_context
        self._answer = Answer(tokenizer, request.settings)
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
        decoding = self._generator.start([self._request], self._long_context, self.progress)
        self._answer = Answer(self._tokenizer, decoding.requests[0].settings)
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
