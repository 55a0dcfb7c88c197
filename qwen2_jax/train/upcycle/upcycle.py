# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a fine-grained mixture of experts from a dense model (Qwen2 report, arXiv:2407.10671, sec. 2.2.2).

The dense feed-forward layer is copied, each copy's neurons are shuffled, experts are cut out of the copies one after
another, and half of each expert is initialised anew. docs/upcycling.md has the arithmetic, and what the
report leaves open.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from qwen2_jax import checkpoint, validate
from qwen2_jax.checkpoint.formats.names import get, nested, put
from qwen2_jax.config.model_config import FULL, LAYER_TYPES, SPARSE_SIZES, ModelConfig
from qwen2_jax.console import progress_bar
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import declare
from qwen2_jax.model.flops import active_parameters, parameters
from qwen2_jax.parallel.sharding import sharding
from qwen2_jax.train.upcycle.function_kept import UpcyclingReport, measure, sample_tokens, without_mlp
from qwen2_jax.weights.params import Tree, leaves

# D model  F dense width  E experts  W width of an expert or the shared expert  R repeat of a stack

Granularity = Literal["neuron", "element"]
RouterInit = Literal["normal", "zeros"]
SharedInit = Literal["dense", "copies", "random"]
Scale = Literal["none", "preserve"]
DRAWS = 4096  # random tokens over which the weight that the chosen experts get is averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
    """The experts to make and how. Qwen2-57B-A14B is 64 experts of 2560, 8 per token, beside a shared one of 20480."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # width of one expert; the dense width need not be a multiple of it
    shared_expert_intermediate_size: int  # may be wider than the dense layer
    norm_topk_prob: bool = False  # the chosen experts' weights are made to sum to 1; the report's are not
    reinitialise: float = 0.5  # share of each routed expert that is drawn at random
    granularity: Granularity = (
        "neuron"  # what is drawn: whole neurons (gate row, up row, down column) or single weights
    )
    std: float | None = None  # of everything drawn; None: the model's initializer_range
    router_init: RouterInit = "normal"  # with "zeros" every token starts with the same experts, the first ones
    shared_init: SharedInit = "dense"  # where wider than dense: "dense" adds silent neurons, "copies" splits dense ones
    shared_gate_init: RouterInit = "zeros"  # zeros: the gate is 1/2 for every token
    scale: Scale = "none"  # "none" (the report) or "preserve": the layer's expected output is the dense layer's
    routed_share: float | None = None  # for "preserve": what the routed experts supply; None: what they do unscaled
    seed: int = 0

    def __post_init__(self):
        number = functools.partial(validate.number, self, "upcycling")
        number(("num_experts", "num_experts_per_tok"), int, 1)
        number(("moe_intermediate_size", "shared_expert_intermediate_size"), int, 1)
        number(("norm_topk_prob",), bool)
        number(("reinitialise",), float, 0.0)
        number(("std", "routed_share"), float, 0.0, none=True)
        number(("seed",), int, 0)
        choices = {"granularity": Granularity, "router_init": RouterInit, "shared_init": SharedInit}
        for name, allowed in (choices | {"shared_gate_init": RouterInit, "scale": Scale}).items():
            validate.choice(f"upcycling {name}", getattr(self, name), get_args(allowed))
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(f"upcycling: num_experts_per_tok {self.num_experts_per_tok} of {self.num_experts} experts")
        for name in ("reinitialise", "routed_share"):
            if (getattr(self, name) or 0.0) > 1.0:
                raise UserError(f"upcycling: {name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.routed_share is not None and self.scale != "preserve":
            raise UserError("upcycling: routed_share has no effect with scale 'none'; leave it out or set 'preserve'")
        if self.scale == "preserve" and self.shared_init == "random" and self.routed_share not in (None, 1.0):
            raise UserError(
                "upcycling: a random shared expert supplies nothing; leave routed_share out, or set it to 1"
            )

    def copies(self, dense_width: int) -> int:
        """How often the dense layer is copied: 9 times for 64 experts of 2560 out of 18944."""
        return math.ceil(self.num_experts * self.moe_intermediate_size / dense_width)

    def dropped(self, dense_width: int) -> int:
        """Neurons at the end of the last copy that no expert gets."""
        return self.copies(dense_width) * dense_width - self.num_experts * self.moe_intermediate_size

    def redrawn(self) -> int:
        """Neurons of each expert that are drawn at random, of moe_intermediate_size."""
        return round(self.reinitialise * self.moe_intermediate_size)


def sparse_config(dense: ModelConfig, options: Upcycling) -> ModelConfig:
    """The architecture that upcycling makes of a dense one: all layers sparse, everything else as it was."""
    if dense.num_experts:
        raise UserError(f"upcycling starts from a dense model; this one has {dense.num_experts} experts already")
    h, F = options.moe_intermediate_size, dense.intermediate_size
    if options.scale == "preserve" and options.routed_share is None and options.shared_init != "random" and h > F:
        raise UserError(
            f"upcycling: experts of {h} neurons out of a dense layer of {F} may supply more than it does; "
            "give a routed_share"
        )
    return dataclasses.replace(
        dense,
        model_type="qwen2_moe",
        layer_types=tuple(LAYER_TYPES[window != FULL] for window in dense.windows),  # the two types' defaults differ
        decoder_sparse_step=1,
        mlp_only_layers=(),
        norm_topk_prob=options.norm_topk_prob,
        **{name: getattr(options, name) for name in SPARSE_SIZES},
    )


def sparse_layer(config: ModelConfig, options: Upcycling, mlp: Tree, norm_D: jax.Array, layer) -> Tree:
    """The parameters of moe.SparseMLP made of one dense layer; depends on the seed and the layer's index alone.

    No copy of the dense layer is ever made: an expert is a gather of neurons.
    """
    E, W = options.num_experts, options.moe_intermediate_size
    F, D = mlp["gate_FD"].shape
    dtype = mlp["gate_FD"].dtype
    std = config.initializer_range if options.std is None else options.std
    key = jax.random.fold_in(jax.random.key(options.seed), layer)

    def keyed(name: str) -> jax.Array:
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return (jax.random.normal(key, shape) * std).astype(dtype)

    def draw(name: str, *shape: int, init: str = "normal") -> jax.Array:
        return jnp.zeros(shape, dtype) if init == "zeros" else normal(keyed(name), *shape)

    # One order per copy serves gate, up and down, so that a shuffled copy computes what the dense layer does.
    copies = jnp.broadcast_to(jnp.arange(F), (options.copies(F), F))
    orders = jax.random.permutation(keyed("orders"), copies, axis=1, independent=True)
    neurons_EW = orders.reshape(-1)[: E * W].reshape(E, W)
    spread = std * jnp.linalg.norm(norm_D.astype(jnp.float32))
    routed, shared = _scales(options, F, spread, keyed("tokens"))
    down_DF = _times(mlp["down_DF"], routed)

    def expert(inputs: tuple[jax.Array, jax.Array]) -> Tree:
        e, neurons_W = inputs
        fresh_W = jax.random.permutation(jax.random.fold_in(keyed("fresh"), e), jnp.arange(W) < options.redrawn())

        def redrawn(name: str, value: jax.Array, fresh: jax.Array) -> jax.Array:
            if options.reinitialise == 0:
                return value
            draw, which = jax.random.split(jax.random.fold_in(keyed(name), e))
            if options.granularity == "element":
                fresh = jax.random.bernoulli(which, options.reinitialise, value.shape)
            return jnp.where(fresh, normal(draw, *value.shape), value)

        return {
            "gate_EFD": redrawn("gate", mlp["gate_FD"][neurons_W], fresh_W[:, None]),
            "up_EFD": redrawn("up", mlp["up_FD"][neurons_W], fresh_W[:, None]),
            "down_EDF": redrawn("down", jnp.take(down_DF, neurons_W, axis=1), fresh_W),
        }

    experts = jax.lax.map(expert, (jnp.arange(E), neurons_EW))  # one at a time: drawing takes much room
    return experts | {
        "router_ED": draw("router", E, D, init=options.router_init),
        "shared_gate_D": draw("shared gate", D, init=options.shared_gate_init),
        "shared": _shared_expert(options, mlp, draw, keyed("shared order"), shared),
    }


def _shared_expert(options: Upcycling, mlp: Tree, draw: Callable, key: jax.Array, scale) -> Tree:
    """The shared expert. As wide as the dense layer or wider it computes the same, times `scale`."""
    (F, D), W = mlp["gate_FD"].shape, options.shared_expert_intermediate_size
    random = {"gate_FD": ("shared gate_proj", W, D), "up_FD": ("shared up_proj", W, D)}
    if options.shared_init == "random":
        return {name: draw(*what) for name, what in random.items()} | {"down_DF": draw("shared down_proj", D, W)}
    # Narrower: any neurons are as good as the first ones, but of a random choice the expected output is known.
    order_F = jax.random.permutation(key, F) if W < F else jnp.arange(F)
    neurons_W = order_F[jnp.arange(W) % F]
    expert = {name: mlp[name][neurons_W] for name in random}
    down_DW = jnp.take(_times(mlp["down_DF"], scale), neurons_W, axis=1)
    if W > F and options.shared_init == "copies":  # a neuron that is there m times counts 1/m each time
        down_DW = _times(down_DW, 1 / (W // F + (neurons_W < W % F)))
    elif W > F:  # silent, yet learning: their random activations give the zeros of the down projection a gradient
        added_W = jnp.arange(W) >= F
        expert = {name: jnp.where(added_W[:, None], draw(*what), expert[name]) for name, what in random.items()}
        down_DW = jnp.where(added_W, 0, down_DW)
    return expert | {"down_DF": down_DW}


def _scales(options: Upcycling, F: int, spread: jax.Array, key: jax.Array) -> tuple:
    """Factors of the routed and of the shared down projections; docs/upcycling.md derives them.

    spread: standard deviation of the router's logits over experts.
    """
    if options.scale == "none":
        return 1, 1
    E, k = options.num_experts, options.num_experts_per_tok
    if options.norm_topk_prob:
        weight = jnp.float32(1)
    elif options.router_init == "zeros":
        weight = jnp.float32(k / E)
    else:  # what the k best of E probabilities add up to: k / E for equal ones, more for a router that prefers
        p = jax.nn.softmax(spread * jax.random.normal(key, (DRAWS, E)))
        weight = jax.lax.top_k(p, k)[0].sum(axis=-1).mean()
    unscaled = weight * options.moe_intermediate_size / F  # of the dense output, by the routed experts
    if options.shared_init == "random":
        return 1 / unscaled, 1
    share = unscaled if options.routed_share is None else options.routed_share
    widest = max(1, F / options.shared_expert_intermediate_size)
    return share / unscaled, 2 * (1 - share) * widest  # 2: the shared expert's gate starts at 1/2


def _times(x: jax.Array, factor) -> jax.Array:
    """x * factor, rounded once to x's dtype; x itself for the number 1."""
    if isinstance(factor, int):
        return x
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class Layers:
    """The sparse layers of a dense model, made when asked for. A layer is named (stack, repeat)."""

    def __init__(self, config: ModelConfig, params: Tree, options: Upcycling):
        self.params, self.sparse = params, sparse_config(config, options)
        stacks = params["stacks"]
        self.names = [(i, r) for i in sorted(stacks) for r in range(self.repeats(i))]
        where = getattr(params["embed_VD"], "sharding", None)
        self._program = _program(config, options, where.mesh if isinstance(where, NamedSharding) else None)
        self._latest: tuple[tuple[int, int] | None, Tree] = None, {}

    def block(self, i: int) -> Tree:
        return self.params["stacks"][i]["blocks"][0]

    def repeats(self, i: int) -> int:
        return self.block(i)["mlp_norm_D"].shape[0]

    def moe(self, i: int, r: int) -> Tree:
        """The replacement of this layer's mlp. The latest one is cached."""
        if self._latest[0] != (i, r):
            self._latest = None, {}  # freed before the next one is made
            block = self.block(i)
            self._latest = (i, r), self._program(block["mlp"], block["mlp_norm_D"], r, self.names.index((i, r)))
        return self._latest[1]

    def stacked(self) -> Tree:
        """All parameters of the mixture of experts; a stack's array is filled in place, layer by layer."""

        def fill(i: int) -> Tree:
            moe: Tree = {}
            for r in range(self.repeats(i)):
                layer = self.moe(i, r)
                moe = _set_layer(moe or jax.tree.map(functools.partial(_room, self.repeats(i)), layer), layer, r)
                jax.block_until_ready(moe)  # else layers would pile up in the queue
            return moe

        return self._assembled(fill)

    def lazy(self) -> Tree:
        """All parameters for checkpoint.save_hf, which asks layer by layer: the sparse ones are made then."""

        def promise(i: int) -> Tree:
            block = self.block(i)
            layer = jax.eval_shape(self._program, block["mlp"], block["mlp_norm_D"], 0, 0)
            moe: Tree = {}
            for path, leaf in leaves(layer):
                make = functools.partial(self._leaf, i, path)
                put(moe, path, Lazy((self.repeats(i), *leaf.shape), leaf.dtype, make))
            return moe

        return self._assembled(promise)

    def _assembled(self, moe_of: Callable[[int], Tree]) -> Tree:
        stacks = {i: {"blocks": {0: without_mlp(self.block(i)) | {"moe": moe_of(i)}}} for i in self.params["stacks"]}
        return self.params | {"stacks": stacks}

    def _leaf(self, i: int, path: tuple, r: int) -> jax.Array:
        return get(self.moe(i, r), path)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A stacked parameter whose layers are made when they are asked for."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    make: Callable[[int], jax.Array]

    def __getitem__(self, r: int) -> jax.Array:
        return self.make(r)


@functools.lru_cache(maxsize=4)
def _program(config: ModelConfig, options: Upcycling, mesh: Mesh | None) -> Callable:
    """sparse_layer of layer r of a stack, compiled once for all layers, its result laid out by the sharding rules."""

    def one(mlp: Tree, norm_RD: jax.Array, r: int, layer: int) -> Tree:
        return sparse_layer(config, options, jax.tree.map(lambda p: p[r], mlp), norm_RD[r], layer)

    if mesh is None:
        return jax.jit(one)
    specs = declare(sparse_config(config, options))[1]["stacks"][0]["blocks"][0]["moe"]
    return jax.jit(one, out_shardings=nested({p: sharding(s.axes[1:], s.shape[1:], mesh) for p, s in leaves(specs)}))


def _room(repeats: int, layer: jax.Array) -> jax.Array:
    """Zeros for `repeats` such layers, on the same devices."""
    where = layer.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    return jnp.zeros((repeats, *layer.shape), layer.dtype, device=where)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Tree, layer: Tree, r: int) -> Tree:
    return jax.tree.map(lambda all_layers, one: all_layers.at[r].set(one), stacked, layer)


def upcycle(config: ModelConfig, params: Tree, options: Upcycling) -> tuple[ModelConfig, Tree]:
    """The mixture of experts made of a dense model, on the devices and in the dtypes of `params`, stacked as they are.

    Beside the two models one layer exists. What is no feed-forward layer is not copied: the two trees share it, so
    donating one tree invalidates the other. A seed gives the same values on any mesh.
    """
    layers = Layers(config, params, options)
    return layers.sparse, layers.stacked()


def sizes(source: str | Path | checkpoint.Source, options: Upcycling) -> str:
    """A sentence with the sizes of the model that upcycling would make; reads the config only."""
    config = checkpoint.read_config(checkpoint.locate(source))
    sparse, F = sparse_config(config, options), config.intermediate_size
    return (
        f"{parameters(config):,} parameters become {parameters(sparse):,}, of which a token meets "
        f"{active_parameters(sparse):,}: {options.copies(F)} copies of each feed-forward layer, "
        f"{options.dropped(F):,} neurons left over"
    )


def write(
    source: str | Path | checkpoint.Source,
    folder: str | Path,
    options: Upcycling,
    console: Console | None = None,
    *,
    replace: bool = False,
) -> UpcyclingReport:
    """Upcycles a dense checkpoint into a Hugging Face folder that transformers loads as Qwen2Moe, and measures it.

    The mixture of experts never exists as a whole, its layers are made as they are written: beside the dense model,
    memory holds one sparse layer, and two while measuring. replace: an older result gives way to the finished new one.
    """
    console = console or Console(stderr=True)
    source = checkpoint.locate(source)
    console.print(sizes(source, options))
    config = checkpoint.read_config(source)
    sparse = sparse_config(config, options)
    with progress_bar("reading") as progress:
        params = checkpoint.load_params(source, config, progress=progress)
    with progress_bar("writing") as progress:
        tree = Layers(config, params, options).lazy()
        checkpoint.save_hf(folder, sparse, tree, tokenizer_files_from=source, progress=progress, replace=replace)
    del tree  # it caches a layer
    return report(config, params, options, sample_tokens(source, config))


def report(config: ModelConfig, params: Tree, options: Upcycling, tokens_BT: jax.Array | np.ndarray) -> UpcyclingReport:
    """Measures on tokens [B, T], T at least 2, what upcycling with these options does to a dense model.

    The sparse layers are made on the way, before and after the random draws: two exist at a time.
    """
    before = Layers(config, params, dataclasses.replace(options, reinitialise=0.0))
    after = Layers(config, params, options)
    layers = ((before.block(i), r, [before.moe(i, r), after.moe(i, r)]) for i, r in before.names)
    return measure(config, before.sparse, params, layers, jnp.asarray(tokens_BT, jnp.int32))
