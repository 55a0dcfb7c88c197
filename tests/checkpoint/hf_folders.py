# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints in Hugging Face format, written by the safetensors library and not by the code under test."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)

DENSE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TIED = DENSE | {"tie_word_embeddings": True}
SPARSE = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LINEAR_SCORE = TIED | LABEL | {"architectures": ["Qwen2ForSequenceClassification"]}
DEEP_SCORE = SPARSE | LABEL | {"architectures": ["Qwen2MoeForRewardModel"]}
ALTERNATING = SPARSE | {"decoder_sparse_step": 2, "num_hidden_layers": 4}


def tensors_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 file as transformers writes them, spelled out here independently of the package."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = D // N
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if config["architectures"][0].endswith("SequenceClassification"):
        out["score.weight"] = (1, D)
    elif config["architectures"][0].endswith("RewardModel"):
        out |= {"score.0.weight": (D, D), "score.0.bias": (D,), "score.2.weight": (1, D), "score.2.bias": (1,)}
    elif not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        out |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        for name, heads in (("q", N), ("k", K), ("v", K)):
            out |= {
                at + f"self_attn.{name}_proj.weight": (heads * H, D),
                at + f"self_attn.{name}_proj.bias": (heads * H,),
            }
        out[at + "self_attn.o_proj.weight"] = (D, N * H)

        def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
            up = {prefix + f"{name}_proj.weight": (width, D) for name in ("gate", "up")}
            return up | {prefix + "down_proj.weight": (D, width)}

        if config.get("num_experts") and (i + 1) % config["decoder_sparse_step"] == 0:
            E = config["num_experts"]
            out |= {at + "mlp.gate.weight": (E, D), at + "mlp.shared_expert_gate.weight": (1, D)}
            out |= mlp(at + "mlp.shared_expert.", config["shared_expert_intermediate_size"])
            for e in range(E):
                out |= mlp(at + f"mlp.experts.{e}.", config["moe_intermediate_size"])
        else:
            out |= mlp(at + "mlp.", F)
    return out


def random_tensors(config: dict, dtype=BF16, seed: int = 0) -> dict[str, np.ndarray]:
    """dtype: one for all, or a function from name to dtype."""
    rng = np.random.default_rng(seed)
    pick = dtype if callable(dtype) and not isinstance(dtype, np.dtype) else lambda name: dtype
    return {n: rng.standard_normal(shape, np.float32).astype(pick(n)) for n, shape in tensors_of(config).items()}


def write_folder(
    folder: Path, config: dict, tensors: dict[str, np.ndarray], *, shards: int = 1, extras: bool = True
) -> Path:
    """A Hugging Face folder; shards > 1 writes an index. extras: tokenizer and generation files with unusual bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n\n")
    if extras:
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2],\r\n "top_p": 0.8}')
        (folder / "tokenizer.json").write_bytes('{"note": "not a tokenizer: é€😀"}'.encode())
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
        (folder / "merges.txt").write_bytes(b"a b\nc d")
        (folder / "LICENSE").write_text("license text")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def files_of(folder: Path, *, but: tuple[str, ...] = ("manifest.json",)) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.is_file() and f.name not in but}
