# SPDX-License-Identifier: Apache-2.0
"""A prompt with its sampling parameters, and whether a model can answer it."""

import dataclasses
from collections.abc import Sequence
from typing import NewType

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine.buckets import context_limit
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.model.decoder import check_head
from qwen2_jax.model.rope import LongContext


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (at least one token id) and how to continue it. The engine ignores sampling_params.stop."""

    tokens: tuple[int, ...]
    sampling_params: SamplingParams


CheckedRequest = NewType("CheckedRequest", Request)  # what check_request returns; Generator.start takes no other


def check_request(config: ModelConfig, request: Request, long_context: LongContext, what: str) -> CheckedRequest:
    """As Generator.check."""
    check_head(config, scores=False)
    limit = context_limit(config, long_context)
    check_tokens(config, request.tokens, limit - 1, long_context, what)
    params, prompt = request.sampling_params, len(request.tokens)
    asked = params.constraints
    if 0 < asked.max_length <= prompt:
        raise UserError(
            f"{what} has {prompt} tokens, and generation_config.json has max_length {asked.max_length} for prompt "
            "and answer together: give max_new_tokens"
        )
    room = min(limit, asked.max_length or limit) - prompt
    if params.max_new_tokens > room:
        params = dataclasses.replace(params, max_new_tokens=room)
    if asked.min_length - prompt > asked.min_new_tokens:
        asked = dataclasses.replace(asked, min_new_tokens=asked.min_length - prompt)
        params = dataclasses.replace(params, constraints=asked)
    return CheckedRequest(request if params is request.sampling_params else Request(request.tokens, params))


def check_tokens(
    config: ModelConfig, tokens: Sequence[int], limit: int, long_context: LongContext, what: str = "the input"
) -> None:
    """Raises UserError for no tokens, ids outside the vocabulary, or more than `limit` tokens."""
    if not len(tokens):
        raise UserError(f"{what} is empty; give at least one token")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(f"{what} has token id {wrong}; this model's ids are 0 to {config.vocab_size - 1}")
    if len(tokens) > limit:
        longest = context_limit(config, "auto") - context_limit(config, long_context) + limit
        hint = f" ({longest} with long_context='auto')" if long_context == "off" and longest > limit else ""
        raise UserError(f"{what} has {len(tokens)} tokens; this model takes at most {limit}{hint}: shorten it")
