# SPDX-License-Identifier: Apache-2.0
"""One answer, piece by piece, while the model generates it."""

import time
from collections.abc import Iterator

from qwen2_jax.errors import UserError
from qwen2_jax.infer.detokenize import Generation, IncrementalDetokenizer, advance, not_finite
from qwen2_jax.infer.engine.decode_batch import STEPS
from qwen2_jax.infer.engine.programs import CheckedRequest, Generator, Progress
from qwen2_jax.infer.engine.sampling_params import NOT_FINITE
from qwen2_jax.model.rope import LongContext
from qwen2_jax.tokenizer import Tokenizer

SECONDS_PER_PIECE = 0.2  # aimed at, once the first token is there


class Stream:
    """Iterates over the pieces of one answer. `generation` is complete once the iteration has ended. It ends with a
    UserError where the model's logits are not finite numbers.

    first_seconds: from the first request for a piece to the first token; seconds: to the end. prompt_tokens: int.
    progress: set it before iterating; it is called with (tokens done, tokens in all) during the prefill.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer | None, request: CheckedRequest, *, long_context: LongContext
    ):
        self._generator, self._tokenizer, self._request = generator, tokenizer, request
        self._long_context = long_context
        self._answer = IncrementalDetokenizer(tokenizer, request.sampling_params)
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
        batch = self._generator.start([self._request], self._long_context, self.progress)
        steps = 1  # the first token is yielded at once
        while not self._answer.reason:
            before = time.perf_counter()
            piece = advance(batch, [self._answer], steps)[0]
            now = time.perf_counter()
            self.seconds = now - begin
            self.first_seconds = self.first_seconds or self.seconds
            per_token = (now - before) / steps
            steps = max(1, min(STEPS, int(SECONDS_PER_PIECE / per_token)))
            if piece:
                yield piece
        if self._answer.reason == NOT_FINITE:
            raise UserError(not_finite(self.generation))
