# SPDX-License-Identifier: Apache-2.0
"""Real shapes of weight_only_matmul: matrices of the family, stored as in its official quantised files.

M rows, I inputs, O outputs, group inputs of a group, bits of an integer, offset 1 where groups have one.
"""

MATRICES = {
    "qwen2-0.5b gate": {"O": 4864, "I": 896},
    "qwen2-7b gate": {"O": 18944, "I": 3584},
    "qwen2-7b down": {"O": 3584, "I": 18944},
    "qwen2-72b gate": {"O": 29696, "I": 8192},
    "qwen2-72b head": {"O": 152064, "I": 8192},
}
FORMS: dict[str, dict[str, int | None]] = {
    "gptq-int4": {"group": 128, "bits": 4, "offset": None},
    "gptq-int8": {"group": 128, "bits": 8, "offset": None},
    "q4_k": {"group": 32, "bits": 4, "offset": 1},
}
ROWS = {"one": 1, "batch of 8": 8, "prefill 512": 512, "prefill 4k": 4096}

SHAPES: dict[str, dict] = {
    f"{matrix} {form} {rows}": {"M": M, **MATRICES[matrix], **FORMS[form]}
    for matrix in MATRICES
    for form in FORMS
    for rows, M in ROWS.items()
}
