# SPDX-License-Identifier: Apache-2.0
"""Real shapes of grouped_matmul and grouped_swiglu: the two mixtures of experts of the family.

M rows (tokens times experts per token), E experts, D model width, F width of one expert. Gate and up go from D to F,
down from F to D.
"""

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
