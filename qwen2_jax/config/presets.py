# SPDX-License-Identifier: Apache-2.0
"""The released Qwen2, Qwen2.5 and Qwen1.5-MoE checkpoints as data: one shape per size, one row per checkpoint.

`config.PRESETS` is built from this table. Base and instruct checkpoints of one size differ in `rms_norm_eps`,
`eos_token_id` and `max_position_embeddings`, so every checkpoint has its own row. None of them enables its sliding
window: `sliding_window` is recorded as published, None where the published value is unknown.
"""

_DENSE = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
_SPARSE = "moe_intermediate_size shared_expert_intermediate_size num_experts num_experts_per_tok"


def _dense(sizes: str, tied: bool) -> dict[str, object]:
    numbers = map(int, sizes.split())
    return {"model_type": "qwen2", "tie_word_embeddings": tied, **dict(zip(_DENSE.split(), numbers, strict=True))}


def _sparse(sizes: str, experts: str) -> dict[str, object]:
    numbers = map(int, experts.split())
    return _dense(sizes, False) | {"model_type": "qwen2_moe", **dict(zip(_SPARSE.split(), numbers, strict=True))}


SHAPES: dict[str, dict[str, object]] = {
    #              D    L   N  K  F     V
    "0.5B": _dense("896  24 14 2  4864  151936", True),
    "1.5B": _dense("1536 28 12 2  8960  151936", True),
    "3B":   _dense("2048 36 16 2  11008 151936", True),
    "7B":   _dense("3584 28 28 4  18944 152064", False),
    "14B":  _dense("5120 48 40 8  13824 152064", False),
    "32B":  _dense("5120 64 40 8  27648 152064", False),
    "72B":  _dense("8192 80 64 8  29568 152064", False),
    #                                                   expert shared experts top_k
    "57B-A14B": _sparse("3584 28 28 4  18944 151936", "2560 20480 64 8"),
    "A2.7B":    _sparse("2048 24 16 16 5632  151936", "1408 5632  60 4"),
}  # fmt: skip

END_OF_TEXT, IM_END = 151643, 151645
_K32, _K128 = 32768, 131072
_1M = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}

ROWS: list[tuple[str, str, float, int, int | None, int, int]] = [
    # checkpoint                 shape      eps   positions sliding_window max_window_layers eos
    ("Qwen2-0.5B",              "0.5B",     1e-6, _K128, _K128, 24, END_OF_TEXT),
    ("Qwen2-0.5B-Instruct",     "0.5B",     1e-6, _K32,  _K32,  24, IM_END),
    ("Qwen2-1.5B",              "1.5B",     1e-6, _K128, _K128, 28, END_OF_TEXT),
    ("Qwen2-1.5B-Instruct",     "1.5B",     1e-6, _K32,  _K32,  28, IM_END),
    ("Qwen2-7B",                "7B",       1e-6, _K128, _K128, 28, END_OF_TEXT),
    ("Qwen2-7B-Instruct",       "7B",       1e-6, _K32,  _K128, 28, IM_END),
    ("Qwen2-72B",               "72B",      1e-5, _K128, _K128, 80, END_OF_TEXT),
    ("Qwen2-72B-Instruct",      "72B",      1e-6, _K32,  _K128, 80, IM_END),
    ("Qwen2-57B-A14B",          "57B-A14B", 1e-6, _K128, _K128, 28, END_OF_TEXT),
    ("Qwen2-57B-A14B-Instruct", "57B-A14B", 1e-6, _K32,  None,  28, END_OF_TEXT),  # as published, unlike the others
    ("Qwen1.5-MoE-A2.7B",       "A2.7B",    1e-6, 8192,  _K32,  21, END_OF_TEXT),
    ("Qwen1.5-MoE-A2.7B-Chat",  "A2.7B",    1e-6, _K32,  _K32,  21, IM_END),
    ("Qwen2.5-0.5B",            "0.5B",     1e-6, _K32,  None,  24, END_OF_TEXT),
    ("Qwen2.5-0.5B-Instruct",   "0.5B",     1e-6, _K32,  _K32,  21, IM_END),
    ("Qwen2.5-1.5B",            "1.5B",     1e-6, _K128, _K128, 28, END_OF_TEXT),
    ("Qwen2.5-1.5B-Instruct",   "1.5B",     1e-6, _K32,  None,  21, IM_END),
    ("Qwen2.5-3B",              "3B",       1e-6, _K32,  None,  36, END_OF_TEXT),
    ("Qwen2.5-7B",              "7B",       1e-6, _K128, None,  28, END_OF_TEXT),
    ("Qwen2.5-7B-Instruct",     "7B",       1e-6, _K32,  None,  28, IM_END),
    ("Qwen2.5-14B",             "14B",      1e-5, _K128, None,  48, END_OF_TEXT),
    ("Qwen2.5-14B-Instruct",    "14B",      1e-6, _K32,  _K128, 70, IM_END),
    ("Qwen2.5-32B",             "32B",      1e-5, _K128, None,  64, END_OF_TEXT),
    ("Qwen2.5-32B-Instruct",    "32B",      1e-6, _K32,  _K128, 70, IM_END),
    ("Qwen2.5-72B",             "72B",      1e-5, _K128, None,  80, END_OF_TEXT),
    ("Qwen2.5-72B-Instruct",    "72B",      1e-6, _K32,  None,  70, IM_END),
    ("Qwen2.5-7B-Instruct-1M",  "7B",       1e-5, 1010000, None,    28, IM_END),
    ("Qwen2.5-14B-Instruct-1M", "14B",      1e-5, 1010000, 1010000, 48, IM_END),
]  # fmt: skip


def _forms(name: str) -> tuple[str, ...]:
    """In which quantised forms Qwen publishes a checkpoint, as the ends of their repositories' names."""
    if name.endswith("-1M") or not name.endswith(("-Instruct", "-Chat")):
        return ()
    if "MoE" in name:
        return ("GPTQ-Int4",)
    return ("GPTQ-Int4", "GGUF") if "A14B" in name else ("GPTQ-Int4", "GPTQ-Int8", "AWQ", "GGUF")


# Quantised checkpoints: Hub ids by name. "qwen2-7b-instruct-gguf" needs a type behind a colon, one of GGUF_TYPES.
QUANTISED_HUB_IDS = {f"{row[0]}-{form}".lower(): f"Qwen/{row[0]}-{form}" for row in ROWS for form in _forms(row[0])}
GGUF_TYPES = ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0", "fp16")  # of Qwen's own files


def hub_config(row: tuple[str, str, float, int, int | None, int, int]) -> dict[str, object]:
    """One row spelled as the checkpoint's config.json."""
    name, shape, eps, positions, window, window_layers, eos = row
    long = name.endswith("-1M")
    return SHAPES[shape] | {
        "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "torch_dtype": "bfloat16",
        "rms_norm_eps": eps, "max_position_embeddings": positions, "rope_theta": 1e7 if long else 1e6,
        "use_sliding_window": False, "sliding_window": window, "max_window_layers": window_layers,
        "bos_token_id": END_OF_TEXT, "eos_token_id": eos,
        **({"dual_chunk_attention_config": _1M} if long else {}),
    }  # fmt: skip
