# SPDX-License-Identifier: Apache-2.0
"""Prompts as infer.py gives them to the model, and answers as it prints them."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM, Prompt, Stream


CHAT_TOKENS, COMPLETION_TOKENS = 512, 128  # max_new_tokens where neither the user nor the checkpoint gives one


def with_answer_length(lm: "LM", given: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The sampling parameters given, and max_new_tokens: infer.py's answers are longer than those of LM.generate."""
    default = None if lm.stored_params.limits_length else CHAT_TOKENS if chat else COMPLETION_TOKENS
    return {"max_new_tokens": default, **given}


def to_prompt(lm: "LM", prompt: str, *, system: str | None, raw: bool) -> "Prompt":
    """The user's text as messages for a chat model, as token ids where there is no tokenizer, else as it is."""
    if lm.tokenizer is None and all(word.isdigit() for word in prompt.split()):
        return [int(word) for word in prompt.split()]
    if lm.is_chat and not raw:
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    if system:
        raise UserError("--system needs a chat model, and no --raw")
    return prompt


def to_json(record: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def record(stream: "Stream") -> dict[str, Any]:
    """One answer as --json prints it."""
    answer = stream.generation
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "logprobs": [round(value, 6) for value in answer.logprobs],
        "finish_reason": answer.finish_reason,
        "prompt_tokens": stream.prompt_tokens,
        "timings": {
            "first_token_s": round(stream.first_seconds, 4),
            "total_s": round(stream.seconds, 4),
            "tokens_per_s": round(_speed(stream), 2),
        },
    }


def summary(stream: "Stream") -> str:
    """One line about the time an answer took."""
    count = len(stream.generation.token_ids)
    return (
        f"{stream.prompt_tokens} prompt tokens, first token after {stream.first_seconds:.2f} s, "
        f"{count} tokens in {stream.seconds:.2f} s ({_speed(stream):.1f} tokens/s), {stream.generation.finish_reason}"
    )


def _speed(stream: "Stream") -> float:
    """Tokens per second after the first token, whose time includes the prompt and compilation."""
    after = stream.seconds - stream.first_seconds
    return (len(stream.generation.token_ids) - 1) / after if after > 0 else 0.0
