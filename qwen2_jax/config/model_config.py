# SPDX-License-Identifier: Apache-2.0
"""The architecture of a Qwen2 model, read from and written to Hugging Face's config.json.

`ModelConfig` keeps Hugging Face's field names. Everything in a config.json that changes the mathematics is read here or
refused here with an error that names the key, its value and what is supported; nothing is ignored silently.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, Self

from qwen2_jax import validate
from qwen2_jax.config import architectures, presets
from qwen2_jax.config.architectures import HeadKind
from qwen2_jax.config.layer_scans import LayerScan, shortest
from qwen2_jax.config.rope_settings import (
    FULL,
    LAYER_TYPES,
    MAX_POSITIONS,
    DualChunk,
    RopeScaling,
    read_dual_chunk,
    read_rope,
)
from qwen2_jax.errors import UserError

# The largest sizes that are read, far beyond any released model's. Memory and time to declare a model grow with layers,
# experts and head_dim, before a weight is seen.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": MAX_POSITIONS,
    "num_experts": 10_000,
    "num_experts_per_tok": 10_000,
    "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24,
}
SHOWN = 20  # unknown keys that are named in warnings
MAX_EXPERTS = 100_000  # of all layers together
MAX_TOKEN_ID = 2**31 - 1

MODEL_TYPES = ("qwen2", "qwen2_moe")
DTYPES = ("bfloat16", "float16", "float32")

# Keys that leave the next-token distribution alone: bookkeeping, how transformers runs the model, and generation
# settings of files older than generation_config.json.
IGNORED = frozenset(
    """
    architectures auto_map transformers_version _name_or_path name_or_path _commit_hash model_name
    unsloth_version unsloth_fixed use_cache cache_implementation return_dict output_attentions
    output_hidden_states torchscript use_bfloat16 chunk_size_feed_forward tie_encoder_decoder is_decoder
    cross_attention_hidden_size finetuning_task problem_type id2label label2id num_labels tokenizer_class prefix
    task_specific_params tf_legacy_loss sep_token_id decoder_start_token_id attn_implementation
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    _experts_implementation_internal pretraining_tp max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens
    """.split()  # noqa: SIM905
)
# Keys that change the mathematics and are supported at one setting only.
ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "use_mrope": (None, False),
    "mlp_bias": (None, False),
    "attention_bias": (None, True),
    "is_encoder_decoder": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "num_nextn_predict_layers": (None, 0),
    "original_max_position_embeddings": (None,),  # belongs inside rope_scaling
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SPARSE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
# Fields that the Hub's files leave out at their default value; the second tuple in dense models only.
_OPTIONAL = (
    "rope_scaling", "dual_chunk_attention_config", "layer_types", "pad_token_id", "mlp_only_layers", "qkv_bias",
)  # fmt: skip
_SPARSE_ONLY = (
    *SPARSE_SIZES, "norm_topk_prob", "decoder_sparse_step", "router_aux_loss_coef", "output_router_logits",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Qwen2 or Qwen2-MoE architecture; hashable. Fields not explained here mean what they mean in transformers.

    head_dim, num_key_value_heads: None becomes hidden_size // num_attention_heads and num_attention_heads.
    layer_types: None, or one of LAYER_TYPES per layer where that differs from what use_sliding_window and
    max_window_layers say; a tuple that says the same becomes None. num_experts: 0 for a dense model. attention_dropout
    is recorded and has no effect on inference. score_head: of a reward model, which replaces the LM head:
    "linear" (transformers' ForSequenceClassification with one label) or "two_layers" (Qwen's own ForRewardModel).
    dtype: of the weights in the file.

    Raises UserError when fields contradict each other or are not supported.
    """

    model_type: str = "qwen2"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # transformers' default; released checkpoints say 1e6 or 1e7
    rope_scaling: RopeScaling | None = None
    dual_chunk_attention_config: DualChunk | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    score_head: HeadKind | None = None
    dtype: str = "float32"

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        number = functools.partial(validate.number, self, "config")

        def sizes(names, least: int) -> None:
            for name in names:
                number((name,), int, least, most=LARGEST[name])

        sizes(SIZES, 1)
        if self.num_key_value_heads is None:
            put("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            validate.divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            put("head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("layer_types", "mlp_only_layers", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                put(name, tuple(getattr(self, name)))
        if not isinstance(self.mlp_only_layers, tuple) or not isinstance(self.layer_types, tuple | None):
            raise UserError("mlp_only_layers must be a list of layer numbers, and layer_types a list of names or null")

        sizes(("num_key_value_heads", "head_dim", "max_position_embeddings"), 1)
        sizes(SPARSE_SIZES, 0)
        number(("decoder_sparse_step",), int, 1)
        number(("max_window_layers",), int, 0)
        number(("sliding_window",), int, 0, none=True)
        number(("bos_token_id", "pad_token_id"), int, 0, none=True, most=MAX_TOKEN_ID)
        number(("rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef"), float, 0.0)
        number(("rope_theta",), float, above=1.0)
        number(("tie_word_embeddings", "qkv_bias", "use_sliding_window"), bool)
        number(("norm_topk_prob", "output_router_logits"), bool)
        validate.choice("model_type", self.model_type, MODEL_TYPES)
        validate.choice("hidden_act", self.hidden_act, ("silu",))
        validate.choice("score_head", self.score_head, architectures.TASKS.values())
        validate.choice("dtype", self.dtype, DTYPES)
        validate.divides(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embedding needs an even width")
        if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in self.eos_ids):
            raise UserError(
                f"eos_token_id is {validate.short(self.eos_token_id)}; it must be a token id, a list of them or null"
            )
        self._check_experts()
        self._check_windows(put)
        rope = self.rope_scaling
        if rope is not None and rope.type == "yarn" and rope.original_max_position_embeddings is None:
            length = self.max_position_embeddings  # as transformers does
            rope = dataclasses.replace(rope, original_max_position_embeddings=length)
            put("rope_scaling", rope)
        if rope is not None and rope.type == "yarn" and (original := rope.original_max_position_embeddings):
            if rope.factor * original > FULL:
                raise UserError(
                    f"rope_scaling factor is {rope.factor:g} for an original length of {original} tokens; supported: a "
                    f"product of at most {FULL:,}"
                )

    def _check_experts(self) -> None:
        if self.model_type == "qwen2" and self.num_experts:
            raise UserError(f"num_experts is {self.num_experts} with model_type 'qwen2'; experts need 'qwen2_moe'")
        if self.model_type == "qwen2" and not self.qkv_bias:
            raise UserError("qkv_bias is False with model_type 'qwen2'; only 'qwen2_moe' can switch the bias off")
        if self.num_experts:
            validate.number(self, "config", SPARSE_SIZES, int, 1)
            if self.num_experts * self.num_hidden_layers > MAX_EXPERTS:
                raise UserError(
                    f"num_experts is {self.num_experts} in {self.num_hidden_layers} layers; supported: at most "
                    f"{MAX_EXPERTS:,} experts in all layers together"
                )
            if self.num_experts_per_tok > self.num_experts:
                raise UserError(f"num_experts_per_tok is {self.num_experts_per_tok}; num_experts is {self.num_experts}")
        for layer in self.mlp_only_layers:
            if type(layer) is not int or not 0 <= layer < self.num_hidden_layers:
                raise UserError(
                    f"mlp_only_layers has {validate.short(layer)}; allowed are 0 to {self.num_hidden_layers - 1}"
                )

    def _check_windows(self, put) -> None:
        types = self.layer_types
        if types is not None:
            if len(types) != self.num_hidden_layers:
                raise UserError(f"layer_types has {len(types)} entries for {self.num_hidden_layers} layers")
            for entry in types:
                validate.choice("layer_types", entry, LAYER_TYPES)
            if "sliding_attention" in types and not self.use_sliding_window:
                raise UserError("layer_types has 'sliding_attention' while use_sliding_window is False; set it to True")
            if types == self._default_layer_types():
                put("layer_types", None)
        if self.use_sliding_window and not self.sliding_window:
            raise UserError(f"use_sliding_window is True with sliding_window {self.sliding_window}; give 1 or more")

    def _default_layer_types(self) -> tuple[str, ...]:
        """As in transformers: Qwen2 windows the layers from max_window_layers on, Qwen2-MoE the even ones below it."""
        layers = range(self.num_hidden_layers)
        if not self.use_sliding_window:
            sliding = [False for _ in layers]
        elif self.model_type == "qwen2":
            sliding = [i >= self.max_window_layers for i in layers]
        else:
            sliding = [i % 2 == 0 and i < self.max_window_layers for i in layers]
        return tuple(LAYER_TYPES[s] for s in sliding)

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys each layer's query sees, itself included: `sliding_window`, or FULL. A window beyond FULL is none."""
        types, window = self.layer_types or self._default_layer_types(), min(self.sliding_window or FULL, FULL)
        return tuple(window if t == "sliding_attention" else FULL for t in types)

    @property
    def scores(self) -> bool:
        """Whether this is a reward model, which returns scores and has no logits."""
        return self.score_head is not None

    @property
    def trained_length(self) -> int:
        """Tokens up to which the model needs no context extension.

        The original length of YaRN or Dual Chunk Attention, else at most 32768: base checkpoints declare 131072
        positions but were trained at 32768.
        """
        extensions = (self.dual_chunk_attention_config, self.rope_scaling)
        given = [e.original_max_position_embeddings for e in extensions if e and e.original_max_position_embeddings]
        return min(given) if given else min(self.max_position_embeddings, 32768)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, empty when there is none."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen

    def stacks(self, unroll: bool = False) -> tuple[LayerScan, ...]:
        """Cuts the layers into scans with as few blocks to compile as possible, then as few scans as possible.

        Dense and all-sparse models give one scan of one kind, a periodic pattern one scan of its period.
        unroll=True gives one scan per layer.
        """
        kinds = tuple("sparse" if self.is_sparse(i) else "dense" for i in range(self.num_hidden_layers))
        if unroll:
            return tuple(LayerScan((kind,), i, 1) for i, kind in enumerate(kinds))
        return shortest(kinds)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Reads a parsed config.json, spelled as the Hub does or as transformers 5 does.

        Raises UserError for a missing size, a value of the wrong kind, and a setting that is not supported.
        Warns about unknown keys.
        """
        validate.choice("model_type", data.get("model_type"), MODEL_TYPES)
        required = (*SIZES, "num_key_value_heads", *(SPARSE_SIZES if data["model_type"] == "qwen2_moe" else ()))
        if missing := [name for name in required if name not in data]:
            raise UserError(f"the config has no {', '.join(missing)}; {data['model_type']} needs {', '.join(required)}")
        for name, allowed in ONLY.items():
            if data.get(name) not in allowed:
                raise UserError(f"{name} is {validate.short(data[name])}; supported: {', '.join(map(repr, allowed))}")
        names = {field.name for field in dataclasses.fields(cls)} - {"score_head"}
        known = names | IGNORED | ONLY.keys() | {"torch_dtype", "rope_parameters"}
        unknown = sorted(data.keys() - known)
        for name in unknown[:SHOWN]:
            shown = f"{validate.key(name)} = {validate.short(data[name])}"
            warnings.warn(f"the config has {shown}, which is unknown here and has no effect", stacklevel=2)
        if (more := len(unknown) - SHOWN) > 0:
            warnings.warn(f"the config has {more} more keys that are unknown here and have no effect", stacklevel=2)

        values = {name: data[name] for name in names & data.keys()}
        values["rope_theta"], values["rope_scaling"] = read_rope(data)
        values["dual_chunk_attention_config"] = read_dual_chunk(data.get("dual_chunk_attention_config"))
        values["score_head"] = architectures.score_head(data)
        dtypes = (data.get("dtype"), data.get("torch_dtype"))
        values["dtype"] = next((dtype for dtype in dtypes if dtype is not None), "float32")
        if values.get("mlp_only_layers", ()) is None:
            del values["mlp_only_layers"]
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json in the spelling of the Hub's files, which every version of transformers reads.

        `ModelConfig.from_hf(config.to_hf()) == config`. Fields at their default are left out where the Hub's files do.
        """
        dense = self.model_type == "qwen2"
        out: dict[str, Any] = architectures.keys(self.model_type, self.score_head)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "score_head":
                continue
            if field.name == "head_dim" and value * self.num_attention_heads == self.hidden_size:
                continue
            if value == field.default and field.name in (_OPTIONAL + _SPARSE_ONLY if dense else _OPTIONAL):
                continue
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, RopeScaling):
                value = {f.name: v for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default}
            elif isinstance(value, DualChunk):
                value = dataclasses.asdict(value)
            out["torch_dtype" if field.name == "dtype" else field.name] = value
        return out | {"use_cache": True}


PRESETS: dict[str, ModelConfig] = {row[0].lower(): ModelConfig.from_hf(presets.hub_config(row)) for row in presets.ROWS}
HUB_IDS: dict[str, str] = {row[0].lower(): f"Qwen/{row[0]}" for row in presets.ROWS}
