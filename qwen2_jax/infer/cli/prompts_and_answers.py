# SPDX-License-Identifier: Apache-2.0
"""What a prompt becomes on its way into the model and an answer on its way out, for the command line and its files."""

from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM, Prompt, Stream


def phrase(lm: "LM", prompt: str, *, system: str | None, raw: bool) -> "Prompt":
    """A prompt as the model wants it: messages for a chat model, token ids where there is no tokenizer, else text."""
    if lm.tokenizer is None and all(word.isdigit() for word in prompt.split()):
        return [int(word) for word in prompt.split()]
    if lm.is_chat and not raw:
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    if system:
        raise UserError("--system needs a chat model, and no --raw")
    return prompt


def record(stream: "Stream") -> dict[str, Any]:
    """One answer for a program."""
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
    """One line on how long an answer took."""
    count = len(stream.generation.token_ids)
    return (
        f"{stream.prompt_tokens} prompt tokens, first token after {stream.first_seconds:.2f} s, "
        f"{count} tokens in {stream.seconds:.2f} s ({_speed(stream):.1f} tokens/s), {stream.generation.finish_reason}"
    )


def _speed(stream: "Stream") -> float:
    """Tokens per second after the first token, which pays for the prompt and for compiling."""
    after = stream.seconds - stream.first_seconds
    return (len(stream.generation.token_ids) - 1) / after if after > 0 else 0.0
