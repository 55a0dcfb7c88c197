# SPDX-License-Identifier: Apache-2.0
"""Real shapes of grouped_matmul and grouped_swiglu: the two mixtures of experts of the family.

M rows (tokens times experts per token), E experts, D model width, F width of one expert. Gate and up go from D to F,
down from F to D. Of matrices of integers: group inputs of a group (None: a scale for each output), bits of an integer,
offset 1 where groups have one.
"""

from ..weight_only_matmul import shapes as weight_only

EXPERTS = {
    "qwen1.5-moe-a2.7b": {"E": 60, "D": 2048, "F": 1408, "top_k": 4},
    "qwen2-57b-a14b": {"E": 64, "D": 3584, "F": 2560, "top_k": 8},
}

TOKENS = {"one token": 1, "batch of 64": 64, "prefill 512": 512, "train 16k": 16384}

SHAPES = {
    f"{model} {use}": {"M": tokens * sizes["top_k"], **{x: sizes[x] for x in "EDF"}}
    for model, sizes in EXPERTS.items()
    for use, tokens in TOKENS.items()
}

INTEGER_FORMS: dict[str, dict[str, int | None]] = {
    "gptq-int4": weight_only.FORMS["gptq-int4"],  # the only quantised files of the 57B-A14B are this one and GGUF
    "q4_k": weight_only.FORMS["q4_k"],
    "int4": {"group": 64, "bits": 4, "offset": 1},  # --dtype int4
    "int8": {"group": None, "bits": 8, "offset": None},  # --dtype int8
}
INTEGER_TOKENS = {"one token": 1, "batch of 64": 64, "prefill 512": 512, "prefill 4k": 4096}

INTEGER_SHAPES: dict[str, dict] = {
    f"{model} {form} {use}": {"M": tokens * sizes["top_k"], **{x: sizes[x] for x in "EDF"}, **INTEGER_FORMS[form]}
    for model, sizes in EXPERTS.items()
    for form in INTEGER_FORMS
    for use, tokens in INTEGER_TOKENS.items()
}
