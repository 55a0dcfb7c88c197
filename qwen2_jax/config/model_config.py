# SPDX-License-Identifier: Apache-2.0
"""The architecture of a Qwen2 model, read from and written to Hugging Face's config.json.

`ModelConfig` keeps Hugging Face's field names. Everything in a config.json that changes the mathematics is read here or
refused here with an error that names the key, its value and what is supported; nothing is dropped in silence.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, Self

from qwen2_jax import validate
from qwen2_jax.config import architectures, presets
from qwen2_jax.config.architectures import HeadKind
from qwen2_jax.config.layer_scans import Stack, shortest
from qwen2_jax.errors import UserError

FULL = 2**30  # the window of a layer that sees everything: larger than any position

MODEL_TYPES = ("qwen2", "qwen2_moe")
ROPE_TYPES = ("default", "linear", "yarn")
DTYPES = ("bfloat16", "float16", "float32")
LAYER_TYPES = ("full_attention", "sliding_attention")

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
class RopeScaling:
    """How the rotary frequencies are stretched, for every prompt alike as the checkpoint asks.

    type: "yarn" (Peng et al. 2023, arXiv:2309.00071) or "linear": all frequencies divided by `factor`, the other fields
    unused. original_max_position_embeddings: tokens the model was trained at. attention_factor: multiplies cos and sin;
    None derives it from factor, mscale and mscale_all_dim as transformers does. truncate: round the ramp's ends.
    """

    type: str
    factor: float
    original_max_position_embeddings: int | None = None  # an int inside a ModelConfig when type is "yarn"
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        validate.choice("rope_scaling type", self.type, ("linear", "yarn"))
        validate.number(self, "rope_scaling", ("factor", "beta_fast", "beta_slow"), float, 0.0)
        validate.number(self, "rope_scaling", ("attention_factor", "mscale", "mscale_all_dim"), float, 0.0, none=True)
        validate.number(self, "rope_scaling", ("original_max_position_embeddings",), int, 1, none=True)
        validate.number(self, "rope_scaling", ("truncate",), bool)
        if self.factor < 1:
            raise UserError(f"rope_scaling factor is {self.factor}; it must be 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunk:
    """Dual Chunk Attention (An et al. 2024, arXiv:2402.17463), sizes in tokens; the defaults are vLLM's.

    Positions are cut every chunk_size - local_size tokens. original_max_position_embeddings: length above which the
    logits are sharpened; 0 turns that off.
    """

    chunk_size: int = 8192
    local_size: int = 1024
    original_max_position_embeddings: int = 0

    def __post_init__(self):
        validate.number(self, "dual_chunk_attention_config", ("chunk_size", "local_size"), int, 1)
        validate.number(self, "dual_chunk_attention_config", ("original_max_position_embeddings",), int, 0)
        if self.local_size >= self.chunk_size:
            raise UserError(
                f"dual_chunk_attention_config has local_size {self.local_size} and chunk_size {self.chunk_size}; "
                "local_size must be smaller than chunk_size"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Qwen2 or Qwen2-MoE architecture; hashable. Fields not explained here mean what they mean in transformers.

    head_dim, num_key_value_heads: None becomes hidden_size // num_attention_heads and num_attention_heads.
    layer_types: None, or one of LAYER_TYPES per layer where that differs from what use_sliding_window and
    max_window_layers say; a tuple that says the same becomes None. num_experts: 0 for a dense model. attention_dropout
    is recorded and has no effect on inference. score_head: of a reward model, which has it in place of a word head:
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
        number(SIZES, int, 1)
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

        number(("num_key_value_heads", "head_dim", "max_position_embeddings", "decoder_sparse_step"), int, 1)
        number(("max_window_layers", *SPARSE_SIZES), int, 0)
        number(("sliding_window", "bos_token_id", "pad_token_id"), int, 0, none=True)
        number(("rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef"), float, 0.0)
        number(("rope_theta",), float, 1.0)
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
        if not all(type(token) is int and token >= 0 for token in self.eos_ids):
            raise UserError(f"eos_token_id is {self.eos_token_id!r}; it must be a token id, a list of them or null")
        self._check_experts()
        self._check_windows(put)
        rope = self.rope_scaling
        if rope is not None and rope.type == "yarn" and rope.original_max_position_embeddings is None:
            length = self.max_position_embeddings  # as transformers does
            put("rope_scaling", dataclasses.replace(rope, original_max_position_embeddings=length))

    def _check_experts(self) -> None:
        if self.model_type == "qwen2" and self.num_experts:
            raise UserError(f"num_experts is {self.num_experts} with model_type 'qwen2'; experts need 'qwen2_moe'")
        if self.model_type == "qwen2" and not self.qkv_bias:
            raise UserError("qkv_bias is False with model_type 'qwen2'; only 'qwen2_moe' can switch the bias off")
        if self.num_experts:
            validate.number(self, "config", SPARSE_SIZES, int, 1)
            if self.num_experts_per_tok > self.num_experts:
                raise UserError(f"num_experts_per_tok is {self.num_experts_per_tok}; num_experts is {self.num_experts}")
        for layer in self.mlp_only_layers:
            if type(layer) is not int or not 0 <= layer < self.num_hidden_layers:
                raise UserError(f"mlp_only_layers has {layer!r}; allowed are 0 to {self.num_hidden_layers - 1}")

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
        """Keys each layer's query sees, itself included: `sliding_window`, or FULL."""
        types = self.layer_types or self._default_layer_types()
        return tuple(self.sliding_window or FULL if t == "sliding_attention" else FULL for t in types)

    @property
    def scores(self) -> bool:
        """Whether this is a reward model: it gives a text a number, and has no logits."""
        return self.score_head is not None

    @property
    def trained_length(self) -> int:
        """Tokens up to which the model needs no context extension.

        What YaRN or Dual Chunk Attention call the original length, else at most 32768: base checkpoints declare 131072
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

    def stacks(self, unroll: bool = False) -> tuple[Stack, ...]:
        """Cuts the layers into scans with as few blocks to compile as possible, then as few scans as possible.

        Dense and all-sparse models give one stack of one kind, a periodic pattern one stack of its period.
        unroll=True gives one stack per layer.
        """
        kinds = tuple("sparse" if self.is_sparse(i) else "dense" for i in range(self.num_hidden_layers))
        if unroll:
            return tuple(Stack((kind,), i, 1) for i, kind in enumerate(kinds))
        return shortest(kinds)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Reads a parsed config.json, spelled as the Hub does or as transformers 5 does.

        Raises UserError for a missing size, a value of the wrong kind, and a setting that is not supported.
        Warns about a key nobody here knows.
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
        for name in sorted(data.keys() - known):
            message = f"the config has {name} = {validate.short(data[name])}, which is unknown here and has no effect"
            warnings.warn(message, stacklevel=2)

        values = {name: data[name] for name in names & data.keys()}
        values["rope_theta"], values["rope_scaling"] = _read_rope(data)
        values["dual_chunk_attention_config"] = _read_dual_chunk(data.get("dual_chunk_attention_config"))
        values["score_head"] = architectures.score_head(data)
        values["dtype"] = data.get("dtype") or data.get("torch_dtype") or "float32"
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


def _read_rope(data: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """(rope_theta, scaling) from rope_theta and rope_scaling, or from the rope_parameters of transformers 5."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(data.get(name), Mapping | None):
            raise UserError(f"{name} is {validate.short(data[name])}; it must be an object or null")
    old, new = data.get("rope_scaling"), data.get("rope_parameters")
    if old and new and dict(old) != dict(new):
        raise UserError(
            f"rope_scaling {validate.short(old)} and rope_parameters {validate.short(new)} disagree; keep one"
        )
    name = "rope_parameters" if new else "rope_scaling"
    given = dict(new or old or {})
    if nested := [key for key in LAYER_TYPES if key in given]:
        raise UserError(f"{name} has {', '.join(nested)}: settings per layer type; supported: one set for all layers")
    theta = given.pop("rope_theta", data.get("rope_theta", 10000.0))
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    if kinds[0] != kinds[-1]:
        raise UserError(f"{name} has rope_type {kinds[0]!r} and type {kinds[-1]!r}; they must agree")
    kind = kinds[0]
    validate.choice(f"{name} rope_type", kind, ROPE_TYPES)
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError(f"{name} has partial_rotary_factor other than 1.0; supported: 1.0")
    yarn = [field.name for field in dataclasses.fields(RopeScaling) if field.name != "type"]
    allowed = {"default": [], "linear": ["factor"], "yarn": yarn}[kind]
    validate.known(f"{name} of type {kind!r}", given, allowed)
    if kind == "default":
        return theta, None
    if given.get("factor") is None:
        raise UserError(f"{name} of type {kind!r} has no factor; give the factor by which the context is extended")
    return theta, RopeScaling(type=kind, **{key: value for key, value in given.items() if value is not None})


def _read_dual_chunk(given: Any) -> DualChunk | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"dual_chunk_attention_config is {validate.short(given)}; it must be an object or null")
    names = [field.name for field in dataclasses.fields(DualChunk)]
    dense = {key: value for key, value in given.items() if not key.startswith("sparse_attention_")}
    validate.known("dual_chunk_attention_config", dense, names)
    if len(dense) < len(given):  # these choose what an approximation may skip
        warnings.warn("sparse_attention settings have no effect: every visible key is attended to", stacklevel=3)
    return DualChunk(**dense)


PRESETS: dict[str, ModelConfig] = {row[0].lower(): ModelConfig.from_hf(presets.hub_config(row)) for row in presets.ROWS}
HUB_IDS: dict[str, str] = {row[0].lower(): f"Qwen/{row[0]}" for row in presets.ROWS}
