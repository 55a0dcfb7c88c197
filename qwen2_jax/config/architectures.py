# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names of architectures, and the head behind the decoder that each stands for."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from qwen2_jax import validate
from qwen2_jax.errors import UserError

HeadKind = Literal["linear", "two_layers"]
# What follows "Qwen2For" or "Qwen2MoeFor" -> the head of a reward model; None: an LM head.
TASKS: dict[str, HeadKind | None] = {"CausalLM": None, "SequenceClassification": "linear", "RewardModel": "two_layers"}


def score_head(data: Mapping[str, Any]) -> HeadKind | None:
    """The score head of a parsed config.json. Unknown class names mean a language model.

    Raises UserError for Qwen2's other tasks (token classification, ...) and for a number of labels other than 1.
    """
    names, given, by_id = data.get("architectures"), data.get("num_labels"), data.get("id2label")
    if not isinstance(names, list | tuple | None):
        raise UserError(f"architectures is {validate.short(names)}; it must be a list of names, or null")
    if not isinstance(by_id, Mapping | None):
        raise UserError(f"id2label is {validate.short(by_id)}; it must be an object of labels by number, or null")
    if given is not None and (type(given) is not int or given < 0):
        raise UserError(f"num_labels is {validate.short(given)}; it must be a whole number, or null")
    name = names[0] if names else None
    match = re.fullmatch(r"(Qwen2(?:Moe)?For)(\w+)", str(name))
    if match is None:
        return None
    validate.choice("architectures", name, [match[1] + task for task in TASKS])
    head = TASKS[match[2]]
    unsaid = 2 if head == "linear" else 1  # as transformers has it, and Qwen's code
    labels = given or len(by_id or ()) or unsaid
    if head is not None and labels != 1:
        raise UserError(f"{name} has {labels} labels (num_labels, id2label); supported: 1, the score of a reward model")
    return head


def keys(model_type: str, head: HeadKind | None) -> dict[str, Any]:
    """The keys of a config.json that `score_head` reads."""
    task = next(task for task, its in TASKS.items() if its == head)
    one_label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # how transformers writes num_labels=1
    names = [f"Qwen2{'' if model_type == 'qwen2' else 'Moe'}For{task}"]
    return {"architectures": names} | ({} if head is None else one_label)
