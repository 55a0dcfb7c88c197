# SPDX-License-Identifier: Apache-2.0
"""The loss mask: which tokens of a conversation are prediction targets, under each setting of `targets`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Targets = Literal[
    "assistant",  # every answer and the <|im_end|> behind it
    "assistant_newline",  # and the newline behind that, as LLaMA-Factory has it
    "last_assistant",  # the last answer and its <|im_end|>
    "turns_qwen1",  # every answer; of every turn <|im_start|>, <|im_end|> and the newline, as Qwen-1's script has it
    "all",  # every token, as Qwen2's finetune.py has it
]


def trained_answers(targets: Targets, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which messages are answers whose tokens are targets, as far as `targets` decides."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers[-1:] if targets == "last_assistant" else answers


def turn_loss_mask(targets: Targets, *, answer: bool, head: int, content: int, newline: int) -> list[bool]:
    """Whether each token of one ChatML turn is a target.

    The turn is <|im_start|>, `head` tokens of the role and its newline, `content` tokens, <|im_end|>, and `newline`
    tokens of the newline behind that. answer: whether it is one of `trained_answers`.
    """
    frame = targets in ("turns_qwen1", "all")
    return [
        frame,
        *[targets == "all"] * head,
        *[answer or targets == "all"] * content,
        answer or frame,
        *[frame or (answer and targets == "assistant_newline")] * newline,
    ]
