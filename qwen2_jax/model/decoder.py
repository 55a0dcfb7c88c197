# SPDX-License-Identifier: Apache-2.0
"""The Qwen2 decoder: embedding, layers of attention and feed-forward, a final norm and the output head.

Read it from the top: RMSNorm, Block (one layer), Stack (equal layers, scanned), ScoreHead, Qwen2 (the model).
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2_jax import ops
from qwen2_jax.config.layer_scans import LayerScan
from qwen2_jax.config.model_config import FULL, ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model.attention import Attention, Tokens
from qwen2_jax.model.kv_cache import Cache, LayerCache
from qwen2_jax.model.mlp import MLP, RouterStats, SparseMLP
from qwen2_jax.model.rope import Rope, plain
from qwen2_jax.weights.params import Declare, Tree, specs
from qwen2_jax.weights.weight import Weight, matmul, take

# B batch  T query  D model  V vocabulary  R repeats of a stack  L layers (blocks) of its period

REMAT_POLICIES = {
    "full": None,  # keep nothing but each layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the projections' outputs
}


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype, times weight (Zhang & Sennrich 2019)."""
    x32 = x_BTD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x_BTD.dtype) * weight_D


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)). Declared stacked, called for one repeat."""

    def __init__(self, config: ModelConfig, kind: str, declare: Declare):
        D = ("embed", config.hidden_size)
        self.eps, self.sparse = config.rms_norm_eps, kind == "sparse"
        self.attention_norm_D = declare(D, hf="input_layernorm.weight", init="ones")
        self.attention = Attention(config, declare)
        self.mlp_norm_D = declare(D, hf="post_attention_layernorm.weight", init="ones")
        if self.sparse:
            self.moe = SparseMLP(config, declare)
        else:
            self.mlp = MLP(config, declare, width=config.intermediate_size, hf="mlp")

    def __call__(self, x_BTD, tokens: Tokens, window, cache: LayerCache | None, repeat):
        """Returns (x_BTD, cache, RouterStats or None)."""
        attended, cache = self.attention(
            rms_norm(x_BTD, self.attention_norm_D[...], self.eps), tokens, window, cache, repeat
        )
        x_BTD = x_BTD + attended
        normed = rms_norm(x_BTD, self.mlp_norm_D[...], self.eps)
        if self.sparse:
            y_BTD, router = self.moe(normed, tokens.positions_BT >= 0, tokens.implementation)
        else:
            y_BTD, router = self.mlp(normed), None
        return x_BTD + y_BTD, cache, router


class Stack(nnx.Module):
    """A period of layers, repeated: parameters are [R, ...] and a scan runs them, so compile time ignores depth."""

    def __init__(self, config: ModelConfig, plan: LayerScan, key: jax.Array, dtype):
        period = len(plan.kinds)
        layers = [tuple(plan.first + r * period + j for r in range(plan.repeats)) for j in range(period)]
        declare = partial(Declare, key, dtype=dtype, std=config.initializer_range)
        self.blocks = nnx.List([Block(config, kind, declare(layers=layers[j])) for j, kind in enumerate(plan.kinds)])
        self.repeats = plan.repeats
        windows_RL = tuple(tuple(config.windows[layers[j][r]] for j in range(period)) for r in range(plan.repeats))
        # None where no layer has a window: fewer masks, and some attention kernels support no window.
        self.windows_RL = windows_RL if any(w != FULL for row in windows_RL for w in row) else None

    def __call__(self, x_BTD, tokens: Tokens, caches: tuple[LayerCache, ...] | None, remat: str | None):
        """Returns (x_BTD, caches, RouterStats summed over the stack or None)."""

        def period(carry, step):
            x_BTD, caches, router = carry
            blocks, window_L, repeat = step
            window_L = [None] * len(blocks) if window_L is None else window_L
            caches = list(caches) if caches is not None else [None] * len(blocks)
            for j, block in enumerate(blocks):
                x_BTD, caches[j], stats = block(x_BTD, tokens, window_L[j], caches[j], repeat)
                router = add_stats(router, stats)
            return (x_BTD, tuple(caches) if caches[0] is not None else None, router), None

        if remat is not None:
            period = jax.checkpoint(period, policy=REMAT_POLICIES[remat], prevent_cse=self.repeats == 1)
        if self.repeats == 1:  # a scan of one repeat costs time, a slice does not
            blocks = jax.tree.map(lambda p: p[0], self.blocks)
            return period((x_BTD, caches, None), (blocks, self.windows_RL and self.windows_RL[0], 0))[0]
        experts = next((b.moe.router_ED[...].shape[1] for b in self.blocks if b.sparse), None)
        start = (x_BTD, caches, None if experts is None else no_stats(experts))
        windows_RL = None if self.windows_RL is None else jnp.asarray(self.windows_RL, jnp.int32)
        steps = (self.blocks, windows_RL, jnp.arange(self.repeats))
        return jax.lax.scan(period, start, steps)[0]


def no_stats(experts: int) -> RouterStats:
    zeros_E, zero = jnp.zeros(experts, jnp.float32), jnp.zeros((), jnp.float32)
    return RouterStats(counts_E=zeros_E, probabilities_E=zeros_E, z=zero, tokens=zero)


def add_stats(a: RouterStats | None, b: RouterStats | None) -> RouterStats | None:
    return b if a is None else a if b is None else a + b


class ScoreHead(nnx.Module):
    """A reward model's head, one number per hidden state x: w x, or Qwen's own w relu(W x + b) + c.

    w is initialised so small that the scores' standard deviation is at most about 0.2 at any width: the loss of a pair
    starts near ln 2.
    """

    def __init__(self, config: ModelConfig, declare: Declare):
        D, F, one = ("embed", config.hidden_size), ("mlp", config.hidden_size), ("score", 1)
        self.deep = config.score_head == "two_layers"
        small = min(config.initializer_range, 0.2 / math.sqrt(config.hidden_size))
        if self.deep:
            self.up_FD = declare(F, D, hf="score.0.weight")
            self.up_bias_F = declare(F, hf="score.0.bias", init="zeros")
            self.down_1F = declare(one, F, hf="score.2.weight", std=small)
            self.down_bias_1 = declare(one, hf="score.2.bias", init="zeros")
        else:
            self.weight_1D = declare(one, D, hf="score.weight", std=small)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """float32 [...] of hidden states [..., D]."""
        if not self.deep:
            return matmul(hidden, self.weight_1D[...], dtype=jnp.float32)[..., 0]
        up = jax.nn.relu(matmul(hidden, self.up_FD[...], dtype=jnp.float32) + self.up_bias_F[...])
        score = matmul(up.astype(hidden.dtype), self.down_1F[...], dtype=jnp.float32) + self.down_bias_1[...]
        return score[..., 0]


@dataclasses.dataclass(frozen=True)
class Output:
    """hidden_BTD: after the final norm. cache: with this call's tokens. router: sums over sparse layers, or None."""

    hidden_BTD: jax.Array
    cache: Cache | None
    router: RouterStats | None


jax.tree_util.register_dataclass(Output)


class Qwen2(nnx.Module):
    """All Qwen2 models: dense or mixture of experts, LM head or score head (Qwen2 report, arXiv:2407.10671, sec. 2).

    unroll=False stacks equal layers and scans them; unroll=True keeps one array per layer, for decoding where a scan
    would copy each layer's slice (CPU).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, unroll: bool = False):
        key = rngs.params()
        declare = Declare(key, dtype=dtype, std=config.initializer_range)
        V, D = ("vocab", config.vocab_size), ("embed", config.hidden_size)
        self.config = config
        self.embed_VD = declare(V, D, hf="model.embed_tokens.weight")
        self.stacks = nnx.List([Stack(config, plan, key, dtype) for plan in config.stacks(unroll)])
        self.final_norm_D = declare(D, hf="model.norm.weight", init="ones")
        if config.scores:
            self.score_head = ScoreHead(config, declare)
        elif not config.tie_word_embeddings:
            self.head_VD = declare(V, D, hf="lm_head.weight")

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        rope: Rope | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        context_B: jax.Array | None = None,
        pages: ops.PageLayout | None = None,
        remat: str | None = None,
        implementation: str | None = None,
    ) -> Output:
        """Runs the decoder on int32 tokens [B, T].

        rope: None means plain rotary positions from the config.
        positions_BT: default 0..T-1; consecutive within a row (restarting where a new segment does), negative for
            padding. With a cache they are also the slots in which keys and values are stored.
        segments_BT: packed documents, tokens see their own segment only; not together with a cache.
        context_B: int32 [B], tokens in the whole row, for Dual Chunk Attention's factor on the logits; default: the
            largest position given + 1. A prefill in chunks passes the lengths of the whole prompts.
        pages: where tokens [M, 1] of several rows lie in a cache of pages.
        remat: name in REMAT_POLICIES, to recompute activations in the backward pass.
        implementation: names of kernel implementations, see ops; None takes the first that supports the inputs.
        """
        if cache is not None and segments_BT is not None:
            raise ValueError("segments_BT and cache cannot be combined: a cache holds one document per row")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        rope = plain(self.config) if rope is None else rope
        tokens = Tokens.locate(rope, positions_BT, segments_BT, context_B, self.config.head_dim, implementation, pages)

        x_BTD = take(self.embed_VD[...], tokens_BT, self.final_norm_D[...].dtype)
        router, layers = None, []
        for i, stack in enumerate(self.stacks):
            x_BTD, caches, stats = stack(x_BTD, tokens, None if cache is None else cache.layers[i], remat)
            router = add_stats(router, stats)
            layers.append(caches)
        hidden_BTD = rms_norm(x_BTD, self.final_norm_D[...], self.config.rms_norm_eps)
        return Output(hidden_BTD, None if cache is None else Cache(tuple(layers)), router)

    def head_weight(self) -> Weight:
        """The LM head's weight [V, D]: the embedding when tied."""
        check_head(self.config, scores=False)
        return self.embed_VD[...] if self.config.tie_word_embeddings else self.head_VD[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return matmul(hidden, self.head_weight(), dtype=jnp.float32)

    def score(self, hidden: jax.Array) -> jax.Array:
        """float32 scores [...] of hidden states [..., D], of a reward model."""
        check_head(self.config, scores=True)
        return self.score_head(hidden)


def check_head(config: ModelConfig, *, scores: bool) -> None:
    """Raises UserError where logits are requested from a reward model, or scores from a language model."""
    if config.scores and not scores:
        raise UserError(
            "this is a reward model: it has a score head and no LM head, so it scores answers and generates none; use "
            "score, or load the chat model it was made from"
        )
    if scores and not config.scores:
        raise UserError(
            "this is a language model, which has no score head; load a reward model (an architecture "
            "ForSequenceClassification or ForRewardModel), or use logprobs"
        )


def declare(config: ModelConfig, *, dtype=jnp.float32, unroll: bool = False) -> tuple[nnx.GraphDef, Tree]:
    """The model without arrays: (graphdef, nested dict of ParamSpec). Free at any size.

    `nnx.merge(graphdef, params)` inside a jitted function makes the module from a nested dict of arrays.
    """
    abstract = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), dtype=dtype, unroll=unroll))
    return nnx.split(abstract)[0], specs(abstract)


def split(model: Qwen2) -> tuple[nnx.GraphDef, Tree]:
    """(graphdef, nested dict of arrays) of a model: the inputs of jitted functions."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init(config: ModelConfig, seed: int = 0, *, dtype=jnp.float32, unroll: bool = False) -> Tree:
    """Random parameters, made inside one compiled function."""
    return jax.jit(lambda: split(Qwen2(config, rngs=nnx.Rngs(seed), dtype=dtype, unroll=unroll))[1])()


def unroll(params: Tree, config: ModelConfig) -> Tree:
    """Stacked parameters as those of a model with unroll=True: one array per layer. Copies."""
    layers = {}
    for i, plan in enumerate(config.stacks()):
        for r in range(plan.repeats):
            for j in range(len(plan.kinds)):
                layer = plan.first + r * len(plan.kinds) + j
                block = jax.tree.map(lambda p, r=r: p[r : r + 1], params["stacks"][i]["blocks"][j])
                layers[layer] = {"blocks": {0: block}}
    return params | {"stacks": layers}
