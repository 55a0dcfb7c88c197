# SPDX-License-Identifier: Apache-2.0
"""LoRA: fine-tuning a low-rank correction b a of the weight matrices, whose base is frozen (Hu et al. 2021).

y = W x + alpha / rank * b (a x), with a random and b zero at the start, so that training begins at the base model
(arXiv:2106.09685, sec. 4.1). Only the adapters are trained: a nested dict like the parameters', in which each
adapted weight is {"a": [R, rank, *in], "b": [R, *out, rank]} in float32. `attach` puts them beside the weights inside
the jitted step; the base may be float32, bfloat16, int8 or int4 (as in
QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
"""

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen2_jax import validate
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model import decoder
from qwen2_jax.weights.adapted import Adapted
from qwen2_jax.weights.params import ParamSpec, Tree, leaves
from qwen2_jax.weights.weight import Weight, is_matrix, stored_forms, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which weights get an adapter, and how large it is."""

    rank: int = 16  # of the correction; parameters and cost grow with it
    alpha: float = 32.0  # the correction is multiplied by alpha / rank
    # Names of Hugging Face modules, or the last parts of their names. In a layer of experts gate_proj, up_proj and
    # down_proj are those of the shared expert.
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rslora: bool = False  # alpha / sqrt(rank) instead: stable at large ranks (Kalajdzievski 2023, arXiv:2312.03732)

    def __post_init__(self):
        validate.number(self, "lora", ("rank",), int, 1)
        validate.number(self, "lora", ("alpha",), float, 0)
        validate.number(self, "lora", ("rslora",), bool)
        if self.alpha == 0:
            raise UserError("lora: alpha is 0, which switches the adapters off; give a positive number")
        if not (isinstance(self.targets, tuple) and self.targets and all(isinstance(t, str) for t in self.targets)):
            raise UserError(f"lora: targets is {validate.short(self.targets)}; give names of modules such as q_proj")

    @property
    def scale(self) -> float:
        """The factor of the correction."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def modules(config: ModelConfig, target: str) -> tuple[str, ...]:
    """The modules of a layer that one of Lora.targets means, by Hugging Face's names, such as self_attn.q_proj.

    Raises UserError, which lists the adaptable modules, if there are none.
    """
    can = adaptable(config)
    found = tuple(name for name in can if f".{name}".endswith(f".{target}"))  # PEFT's rule
    if not found:
        hint = "; routed experts and routers take no adapters" if config.num_experts else ""
        raise UserError(f"lora: targets has {validate.short(target)}; this model can adapt {', '.join(can)}{hint}")
    return found


def all_modules(config: ModelConfig, lora: Lora) -> tuple[str, ...]:
    """The modules of a layer that all targets together mean, sorted: equal for equivalent settings."""
    return tuple(sorted({name for target in lora.targets for name in modules(config, target)}))


def declare(config: ModelConfig, lora: Lora, *, unroll: bool = False) -> Tree:
    """The adapters' declarations: a nested dict of ParamSpec, as model.declare gives them for the parameters.

    Optimizer, sharding and checkpoints read them. unroll: for parameters that are one array per layer.
    """
    chosen = all_modules(config, lora)

    def below(specs: Tree) -> Tree:
        tree: Tree = {}
        for name, spec in specs.items():
            if isinstance(spec, dict):
                tree |= {name: inside} if (inside := below(spec)) else {}
            elif _can_adapt(spec) and _module(spec) in chosen:
                tree[name] = _adapter(spec, lora.rank)
        return tree

    return below(decoder.declare(config, unroll=unroll)[1])


def init(config: ModelConfig, lora: Lora, key: jax.Array, *, unroll: bool = False) -> Tree:
    """Adapters that change nothing yet: b is zero, a uniform in +-1 / sqrt(inputs), as in PEFT.

    Values depend on the key, the module's name and the layer's index alone. To be called inside jit.
    """

    def values(spec: ParamSpec) -> jax.Array:
        if spec.hf.endswith(_B):
            return jnp.zeros(spec.shape, spec.dtype)
        mine, bound = jax.random.fold_in(key, zlib.crc32(spec.hf.encode())), spec.hf_shape[1] ** -0.5

        def draw(layer):
            return jax.random.uniform(jax.random.fold_in(mine, layer), spec.shape[1:], spec.dtype, -bound, bound)

        return jax.vmap(draw)(jnp.asarray(spec.layers))

    return jax.tree.map(values, declare(config, lora, unroll=unroll))


def attach(params: Tree, adapters: Tree, lora: Lora) -> Tree:
    """The parameters with adapters beside the weights they belong to: no copies, no work, made to be used inside jit.

    To train, differentiate with respect to the adapters, not to what this returns.
    """
    return _on_adapted(params, adapters, lora, lambda w: w)


def merge(params: Tree, adapters: Tree, lora: Lora, dtype: DTypeLike | None = None) -> Tree:
    """The parameters with the corrections added, W + scale * b a in float32. Copies.

    dtype: of the weights with an adapter, default the ones they had; bfloat16 rounds away most of a small correction.
    Weights without an adapter are those of `params`. Raises UserError where an adapted weight is stored as integers.
    """
    return _on_adapted(params, adapters, lora, functools.partial(_merged, dtype=dtype))


def share_changed(params: Tree, merged: Tree, adapters: Tree, dtype: DTypeLike) -> float:
    """The share of the numbers of adapted weights that differ from the base's after rounding to `dtype`."""
    changed, total = 0.0, 0
    for (*path, last), _ in leaves(adapters):
        if last == "a":
            base, new = (functools.reduce(operator.getitem, path, tree) for tree in (params, merged))
            assert isinstance(base, jax.Array)
            assert isinstance(new, jax.Array)
            changed += float(_changed(base, new, jnp.dtype(dtype))) * base.size
            total += base.size
    return changed / total


@functools.partial(jax.jit, static_argnums=2)
def _changed(base: jax.Array, new: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.mean(base.astype(dtype) != new.astype(dtype))


def _on_adapted(params: Tree, adapters: Tree, lora: Lora, do: Callable[[Adapted], Weight]) -> Tree:
    """The parameters in which do(w) stands for each weight w with an adapter."""
    if absent := [name for name in adapters if name not in params]:
        raise ValueError(
            f"adapters for {absent[0]!r}, which the parameters lack: is one of them stacked, one unrolled?"
        )
    changed: Tree = {}
    for name, adapter in adapters.items():
        below = isinstance(params[name], dict)
        changed[name] = (
            _on_adapted(params[name], adapter, lora, do) if below else do(_adapted(params[name], adapter, lora))
        )
    return params | changed


def _merged(w: Adapted, dtype: DTypeLike | None) -> jax.Array:
    if forms := stored_forms(w.base):
        raise UserError(
            f"adapters cannot be merged into {forms[0]} weights, which would round them away: load bfloat16"
        )
    return _sum_of_layers(w, jnp.dtype(w.base.dtype if dtype is None else dtype))  # type: ignore[union-attr]


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_layers(w: Adapted, dtype: jnp.dtype) -> jax.Array:
    # One layer at a time: a float32 copy of all layers of a weight is a third of a model.
    return jax.lax.map(lambda layer: layer.summed().astype(dtype), w)


_A, _B = ".lora_A.weight", ".lora_B.weight"  # PEFT's names of a and b


def _adapter(spec: ParamSpec, rank: int) -> Tree:
    """Declarations of one weight's adapter."""
    split = len(spec.shape) - summed(spec)
    outputs, inputs = spec.hf_shape

    def declared(dims: list[tuple[str | None, int]], suffix: str, hf_shape: tuple[int, int]) -> ParamSpec:
        axes, shape = zip(*dims, strict=True)
        hf = _module(spec) + suffix
        return ParamSpec(shape, jnp.dtype(jnp.float32), axes, hf, hf_shape, spec.layers, decay=True)

    dims = list(zip(spec.axes, spec.shape, strict=True))
    a = declared([dims[0], (None, rank), *dims[split:]], _A, (rank, inputs))
    b = declared([*dims[:split], (None, rank)], _B, (outputs, rank))
    return {"a": a, "b": b}


def _adapted(w: Weight, adapter: Tree, lora: Lora) -> Adapted:
    a, b = adapter["a"], adapter["b"]
    if (*b.shape[:-1], *a.shape[2:]) != w.shape or not a.shape[1] == b.shape[-1] == lora.rank:
        raise ValueError(f"adapter a {a.shape}, b {b.shape} of rank {lora.rank} does not fit a weight of {w.shape}")
    return Adapted(w, a, b, lora.scale)


@functools.lru_cache(maxsize=8)
def adaptable(config: ModelConfig) -> tuple[str, ...]:
    """The modules of a layer that may be adapted."""
    return tuple(dict.fromkeys(_module(spec) for _, spec in leaves(decoder.declare(config)[1]) if _can_adapt(spec)))


def _can_adapt(spec: ParamSpec) -> bool:
    return bool(spec.layers) and is_matrix(spec) and "experts" not in spec.axes


def _module(spec: ParamSpec) -> str:
    return spec.hf.removesuffix(".weight")
