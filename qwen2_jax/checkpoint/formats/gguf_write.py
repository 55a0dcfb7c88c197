# SPDX-License-Identifier: Apache-2.0
"""Writes a model as one GGUF file that llama.cpp loads: F32, F16, BF16 or Q8_0, with tokenizer and chat template."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.formats.casting import as_dtype
from qwen2_jax.checkpoint.formats.gguf import gguf_name
from qwen2_jax.checkpoint.formats.gguf_file import MAGIC
from qwen2_jax.checkpoint.formats.gguf_metadata import CONTROL, MODEL_TYPES, NORMAL, UNUSED, USER_DEFINED
from qwen2_jax.checkpoint.formats.names import Slot
from qwen2_jax.checkpoint.formats.protocol import Progress, Tensors
from qwen2_jax.checkpoint.formats.safetensors import DTYPES
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.atomic_folder import new_file
from qwen2_jax.tokenizer import Tokenizer

ALIGNMENT = 32
Q8_0, Q8_0_WEIGHTS = 8, 32
# dtype as `convert` names it: (type of the weight matrices, general.file_type)
KINDS = {"float32": (0, 0), "float16": (1, 1), "bfloat16": (30, 32), "q8_0": (Q8_0, 7)}
NUMPY = {0: DTYPES["F32"], 1: DTYPES["F16"], 30: DTYPES["BF16"]}


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Tensors,
    table: Mapping[str, Slot],
    tokenizer: Tokenizer,
    kind: str,
    progress: Progress | None = None,
) -> Path:
    """Writes the file, one tensor in memory at a time; it appears under its name when it is complete.

    kind: one of KINDS, for the weight matrices. Norms, biases and routers are float32, as llama.cpp wants them, and so
    are rows of a matrix that are no whole blocks of Q8_0.

    Raises:
        CheckpointError: the model has something that GGUF cannot say, its tokenizer is not Qwen2's, or path exists.
    """
    stored = _stored(table, kind)
    header, starts, size = _lay_out(_model(config, kind) | _vocabulary(tokenizer, config.vocab_size), stored)
    total, done = sum(tensors.infos[name].nbytes for name in table), 0
    with new_file(path, size) as file:
        file.write(header)
        for name, array in tensors.stream(list(table)):
            there, expert = gguf_name(name)
            content = _encoded(array, stored[there][0])
            file.seek(starts[there] + (expert or 0) * len(content))
            file.write(content)
            done += tensors.infos[name].nbytes
            if progress is not None:
                progress(done, total)
    return Path(path)


Stored = dict[str, tuple[int, tuple[int, ...]]]  # name: (type, shape as in numpy)


def _stored(table: Mapping[str, Slot], kind: str) -> Stored:
    """The tensors of the file, in their order."""
    stored: Stored = {}
    for name, slot in table.items():
        there, expert = gguf_name(name)
        type_id = KINDS[kind][0] if len(slot.shape) == 2 and "_inp" not in there else 0
        if type_id == Q8_0 and slot.shape[-1] % Q8_0_WEIGHTS:
            type_id = 0
        shape = slot.shape if len(slot.shape) == 1 or slot.shape[0] > 1 else slot.shape[1:]
        stored[there] = type_id, shape if expert is None else (expert + 1, *shape)
    return stored


def _encoded(array: np.ndarray, type_id: int) -> bytes:
    if type_id != Q8_0:
        return as_dtype(np.ascontiguousarray(array), NUMPY[type_id]).tobytes()
    x = as_dtype(np.ascontiguousarray(array), NUMPY[0]).reshape(-1, Q8_0_WEIGHTS)
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scaled = x * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero, as llama.cpp rounds
    return np.concatenate([d.astype(np.float16).view(np.int8), q.astype(np.int8)], axis=-1).tobytes()


def _nbytes(type_id: int, shape: Sequence[int]) -> int:
    entries = int(np.prod(shape))
    return entries // Q8_0_WEIGHTS * 34 if type_id == Q8_0 else entries * NUMPY[type_id].itemsize


def _lay_out(metadata: Mapping[str, Any], stored: Stored) -> tuple[bytes, dict[str, int], int]:
    """(everything before the tensors, where each tensor begins, the size of the file)."""
    offsets, end = {}, 0
    for name, (type_id, shape) in stored.items():
        offsets[name] = end
        end += -(-_nbytes(type_id, shape) // ALIGNMENT) * ALIGNMENT
    out = [MAGIC, struct.pack("<IQQ", 3, len(stored), len(metadata))]
    for key, value in metadata.items():
        out += [_string(key), _value(value)]
    for name, (type_id, shape) in stored.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += [_string(name), dims, struct.pack("<IQ", type_id, offsets[name])]
    header = b"".join(out)
    header += b"\0" * (-len(header) % ALIGNMENT)
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    """With its type in front: uint32, float32, bool, string, array of strings, array of int32."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        case _:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))


def _model(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The keys of the architecture, as llama.cpp's converter writes them."""
    for name, has in (("a sliding window", config.use_sliding_window), ("a score head", config.scores)):
        if has:
            raise CheckpointError(
                f"the model has {name}, which GGUF has no key for with Qwen2; convert it to hf or orbax"
            )
    if config.num_experts and not all(map(config.is_sparse, range(config.num_hidden_layers))):
        raise CheckpointError(
            "the model has dense layers among sparse ones, which GGUF has no key for; convert it to hf"
        )
    architecture = next(name for name, model_type in MODEL_TYPES.items() if model_type == config.model_type)
    out: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        out |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.num_experts:
        out |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }
    if (rope := config.rope_scaling) is not None:
        out |= {"rope.scaling.type": rope.type, "rope.scaling.factor": rope.factor}
        if rope.type == "yarn":
            out["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    general = {"architecture": architecture, "type": "model", "file_type": KINDS[kind][1], "quantization_version": 2}
    return {f"general.{key}": value for key, value in general.items()} | {
        f"{architecture}.{key}": value for key, value in out.items()
    }


def _vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The tokenizer's keys. rows: of the embedding; ids without a token are called [PAD...], as llama.cpp does."""
    if not tokenizer.splits_as_qwen2:
        raise CheckpointError("the tokenizer does not split text as Qwen2's, and llama.cpp has no name for another way")
    described = json.loads(tokenizer.to_json())
    vocabulary, added = tokenizer.vocabulary, {token["id"]: token for token in described["added_tokens"]}
    if max(vocabulary.values()) >= rows:
        raise CheckpointError(f"the tokenizer has the id {max(vocabulary.values())}, and the embedding {rows} rows")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    pairs = described["model"]["merges"]
    out: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": "qwen2",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        "ggml.add_bos_token": False,
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    out |= {f"ggml.{name}_token_id": token for name, token in ids.items() if token is not None}
    if tokenizer.chat_template is not None:
        out["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{key}": value for key, value in out.items()}
