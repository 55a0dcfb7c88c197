# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names of architectures, and the head behind the decoder that each stands for."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from qwen2_jax import validate
from qwen2_jax.errors import UserError

HeadKind = Literal["linear", "two_layers"]
# What follows "Qwen2For" or "Qwen2MoeFor" -> the head of a reward model; None: a word head.
TASKS: dict[str, HeadKind | None] = {"CausalLM": None, "SequenceClassification": "linear", "RewardModel": "two_layers"}


def score_head(data: Mapping[str, Any]) -> HeadKind | None:
    """The score head of a parsed config.json. Names of other projects' classes say nothing: their models write words.

    Raises UserError for another task of Qwen2's, and for another number of labels than a reward model's one.
    """
    names = data.get("architectures")
    name = names[0] if isinstance(names, list | tuple) and names else None
    match = re.fullmatch(r"(Qwen2(?:Moe)?For)(\w+)", str(name))
    if match is None:
        return None
    validate.choice("architectures", name, [match[1] + task for task in TASKS])
    head = TASKS[match[2]]
    unsaid = 2 if head == "linear" else 1  # as transformers has it, and Qwen's code
    labels = data.get("num_labels") or len(data.get("id2label") or ()) or unsaid
    if head is not None and labels != 1:
        raise UserError(f"{name} has {labels} labels (num_labels, id2label); supported: 1, the score of a reward model")
    return head


def keys(model_type: str, head: HeadKind | None) -> dict[str, Any]:
    """The keys of a config.json that `score_head` reads."""
    task = next(task for task, its in TASKS.items() if its == head)
    one_label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # how transformers writes num_labels=1
    names = [f"Qwen2{'' if model_type == 'qwen2' else 'Moe'}For{task}"]
    return {"architectures": names} | ({} if head is None else one_label)
