# SPDX-License-Identifier: Apache-2.0
"""config.json, generation_config.json and the tokenizer's files, made from the metadata of a GGUF file.

What llama.cpp's converter writes for Qwen2 is read back: sizes and rotary settings under the architecture's name, the
vocabulary in GPT-2's byte alphabet with a type for each token, merges, special ids and the chat template.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.stderr_on_success import stderr_on_success
from qwen2_jax.tokenizer import IM_END, pipeline
from qwen2_jax.tokenizer_files import in_one_line

MODEL_TYPES = {"qwen2": "qwen2", "qwen2moe": "qwen2_moe"}
SPLITS = ("qwen2", "deepseek-r1-qwen")  # pre-tokenisations that are Qwen2's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of tokens


class Metadata:
    """The metadata of one model. where: for messages. shapes: of its tensors. dtype: that config.json names."""

    def __init__(self, where: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str):
        self.where, self.metadata, self.shapes, self.dtype = where, metadata, shapes, dtype
        self.architecture = self._get("general.architecture", str)
        if self.architecture not in MODEL_TYPES:
            raise CheckpointError(
                f"{where} holds a model of architecture {self.architecture!r:.60}; supported: {', '.join(MODEL_TYPES)}"
            )

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata, checked. Raises CheckpointError where it is missing and there is no default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.where} has no {key}")
        if isinstance(value, int) and kind is float and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key} is {value!r:.60}; it must be of type {kind.__name__}")
        return value

    def _of_model(self, key: str, kind: type = int, default: Any = None) -> Any:
        return self._get(f"{self.architecture}.{key}", kind, default)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.shapes:
            raise CheckpointError(f"{self.where} has no tensor {tensor}")
        return self.shapes[tensor]

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        return self._get(key, int) if key in self.metadata else None

    def config(self) -> dict[str, Any]:
        """As config.json of a Hugging Face folder has it."""
        layers = self._of_model("block_count")
        if layers > len(self.shapes):
            raise CheckpointError(
                f"{self.where}: {self.architecture}.block_count is {layers}; the file holds {len(self.shapes)} tensors"
            )
        heads, length = self._of_model("attention.head_count"), self._of_model("context_length")
        out: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM" if self.architecture == "qwen2" else "Qwen2MoeForCausalLM"],
            "model_type": MODEL_TYPES[self.architecture],
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": self._of_model("embedding_length"),
            "intermediate_size": self._of_model("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._of_model("attention.head_count_kv", int, heads),
            "hidden_act": "silu",
            "max_position_embeddings": length,
            "rms_norm_eps": _shortest(self._of_model("attention.layer_norm_rms_epsilon", float)),
            "rope_theta": _shortest(self._of_model("rope.freq_base", float, 10000.0)),
            "use_sliding_window": False,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "torch_dtype": self.dtype,
        }
        for name in ("bos", "eos", "pad"):
            if (token := self._id("padding" if name == "pad" else name)) is not None:
                out[f"{name}_token_id"] = token
        if f"{self.architecture}.attention.key_length" in self.metadata:
            out["head_dim"] = self._of_model("attention.key_length")
        if scaling := self._rope_scaling(length):
            out["rope_scaling"] = scaling
        return out | (self._experts() if self.architecture == "qwen2moe" else {})

    def _rope_scaling(self, length: int) -> dict[str, Any] | None:
        if f"{self.architecture}.rope.scale_linear" in self.metadata:  # as older files have it
            return {"type": "linear", "factor": self._of_model("rope.scale_linear", float)}
        kind = self._of_model("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise CheckpointError(
                f"{self.where}: {self.architecture}.rope.scaling.type is {kind!r:.60}; supported: none, linear, yarn"
            )
        scaling = {"type": kind, "factor": self._of_model("rope.scaling.factor", float)}
        if kind == "yarn":
            original = self._of_model("rope.scaling.original_context_length", int, length)
            scaling["original_max_position_embeddings"] = original
        return scaling

    def _experts(self) -> dict[str, Any]:
        """The widths are taken from the tensors: files of before June 2024 have no keys for them."""
        experts, width = self._shape("blk.0.ffn_gate_exps.weight")[:2]
        return {
            "num_experts": self._of_model("expert_count", int, experts),
            "num_experts_per_tok": self._of_model("expert_used_count"),
            "moe_intermediate_size": self._of_model("expert_feed_forward_length", int, width),
            "shared_expert_intermediate_size": self._of_model(
                "expert_shared_feed_forward_length", int, self._shape("blk.0.ffn_gate_shexp.weight")[0]
            ),
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        }

    def generation_config(self) -> dict[str, Any]:
        """eos ids with the end of an answer, which old files of instruct models leave out."""
        eos, tokens = self._id("eos"), self._tokens()
        ends = [] if eos is None else [eos]
        if IM_END in self._get("tokenizer.chat_template", str, "") and IM_END in tokens:
            ends += [tokens.index(IM_END)]
        out = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
        return out | {
            f"{name}_token_id": self._id(key)
            for name, key in (("bos", "bos"), ("pad", "padding"))
            if self._id(key) is not None
        }

    def _tokens(self) -> list[str]:
        tokens = self._get("tokenizer.ggml.tokens", list)
        rows = self._shape("token_embd.weight")[0]
        if len(tokens) != rows:
            raise CheckpointError(
                f"{self.where} has {len(tokens)} tokens in its vocabulary and {rows} in its embedding"
            )
        return tokens

    def tokenizer_config(self) -> dict[str, Any]:
        """Special tokens by name, and the chat template."""
        tokens = self._tokens()
        out: dict[str, Any] = {"add_bos_token": self._get("tokenizer.ggml.add_bos_token", bool, False)}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token = self._id(key)
            if token is not None:
                if not 0 <= token < len(tokens):
                    raise CheckpointError(f"{self.where}: tokenizer.ggml.{key}_token_id is {token}, no token")
                out[f"{name}_token"] = tokens[token]
        if "tokenizer.chat_template" in self.metadata:
            out["chat_template"] = self._get("tokenizer.chat_template", str)
        return out

    def tokenizer(self) -> str:
        """The text of tokenizer.json. Unused tokens, such as [PAD151665], are text like any other."""
        for key, supported in (("model", ("gpt2",)), ("pre", SPLITS)):
            if (found := self._get(f"tokenizer.ggml.{key}", str)) not in supported:
                allowed = ", ".join(supported)
                raise CheckpointError(f"{self.where}: tokenizer.ggml.{key} is {found!r:.60}; supported: {allowed}")
        tokens, types = self._tokens(), self.metadata.get("tokenizer.ggml.token_type")
        if not isinstance(types, np.ndarray) or len(types) != len(tokens):
            raise CheckpointError(f"{self.where}: tokenizer.ggml.token_type is no array of {len(tokens)} numbers")
        merges = [merge.split(" ") for merge in self._get("tokenizer.ggml.merges", list)]
        if len(set(tokens)) < len(tokens) or any(len(merge) != 2 for merge in merges):
            raise CheckpointError(f"{self.where}: a token is given twice, or a merge is no pair of tokens")
        wanted = (NORMAL, CONTROL, USER_DEFINED)  # added tokens are in the vocabulary too, so that they keep their ids
        vocabulary = {
            token: i for i, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=True)) if kind in wanted
        }
        with in_one_line(f"{self.where}: its vocabulary and merges make no tokenizer"), stderr_on_success():
            backend = pipeline(models.BPE(vocabulary, [(first, second) for first, second in merges]))
        added = [
            tokenizers.AddedToken(tokens[i], special=bool(types[i] == CONTROL), normalized=False)
            for i in np.flatnonzero((types == CONTROL) | (types == USER_DEFINED))
        ]
        backend.add_tokens(added)
        return backend.to_str()

    def file(self, name: str) -> str | None:
        """The text of one of the files that FILES names."""
        match name:
            case "tokenizer.json":
                return self.tokenizer()
            case "config.json" | "generation_config.json" | "tokenizer_config.json":
                return json.dumps(getattr(self, name.removesuffix(".json"))(), indent=2, ensure_ascii=False)
        return None


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def _shortest(value: float) -> float:
    """A number that was stored as float32, as it was written before: 9.99999997e-07 is 1e-06."""
    return float(f"{value:.7g}")
