# SPDX-License-Identifier: Apache-2.0
"""The position settings of a config.json: RoPE, YaRN and Dual Chunk Attention."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

from qwen2_jax import validate
from qwen2_jax.errors import UserError

FULL = 2**30  # the window of a layer that sees everything: larger than any position
MAX_POSITIONS = 2**28  # tokens; four times as many, the context that may be reached by extension, are FULL
MAX_ATTENTION_FACTOR = 1000

ROPE_TYPES = ("default", "linear", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")


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
        number = functools.partial(validate.number, self, "rope_scaling")
        number(("factor",), float, 1.0)
        number(("beta_fast", "beta_slow"), float, above=0.0)
        factors = ("attention_factor", "mscale", "mscale_all_dim")
        number(factors, float, 0.0, none=True, most=MAX_ATTENTION_FACTOR)
        number(("original_max_position_embeddings",), int, 1, none=True, most=MAX_POSITIONS)
        number(("truncate",), bool)


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
        number = functools.partial(validate.number, self, "dual_chunk_attention_config", kind=int, most=MAX_POSITIONS)
        number(("chunk_size", "local_size"), least=1)
        number(("original_max_position_embeddings",), least=0)
        if self.local_size >= self.chunk_size:
            raise UserError(
                f"dual_chunk_attention_config has local_size {self.local_size} and chunk_size {self.chunk_size}; "
                "local_size must be smaller than chunk_size"
            )


def read_rope(data: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
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
        raise UserError(
            f"{name} has rope_type {validate.short(kinds[0])} and type {validate.short(kinds[-1])}; they must agree"
        )
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


def read_dual_chunk(given: Any) -> DualChunk | None:
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
