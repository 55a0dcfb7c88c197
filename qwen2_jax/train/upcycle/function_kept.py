# SPDX-License-Identifier: Apache-2.0
"""How well a mixture of experts made of a dense model keeps its function, measured layer by layer and end to end."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model import rope
from qwen2_jax.model.attention import Tokens
from qwen2_jax.model.cross_entropy import token_logprobs
from qwen2_jax.model.decoder import Block, rms_norm
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.weights.params import Declare, Tree
from qwen2_jax.weights.weight import matmul, take

# B batch  T query  D model  V vocabulary


class Match(NamedTuple):
    """A sparse layer's output beside the dense layer's, on the same inputs."""

    times: float  # the multiple of the dense output that comes nearest; 1 is best
    error: float  # norm of the difference over the norm of the dense output


class Kept(NamedTuple):
    """A sparse model beside the dense one."""

    layers: tuple[Match, ...]
    logits_error: float  # relative, as in Match
    loss: float  # nats per token


@dataclasses.dataclass(frozen=True)
class UpcyclingReport:
    """How well upcycling kept the function of a dense model: before and after the random draws."""

    tokens: int
    loss: float  # of the dense model, nats per token
    before: Kept
    after: Kept

    def __str__(self) -> str:
        """A table: a Match per layer, the error of the logits, the loss."""
        lines = [
            f"on {self.tokens} tokens       before re-initialising    after",
            "                      times dense     error    times dense     error",
        ]
        both = self.before, self.after
        for i, matches in enumerate(zip(*(kept.layers for kept in both), strict=True)):
            lines.append(f"layer {i:<12}" + "".join(f"{match.times:15.4f}{match.error:10.4f}" for match in matches))
        lines.append("logits            " + "".join(f"{kept.logits_error:25.4f}" for kept in both))
        lines.append(f"loss  {self.loss:<7.4f}dense" + "".join(f"{kept.loss:25.4f}" for kept in both))
        return "\n".join(lines)


def measure(
    config: ModelConfig,
    sparse: ModelConfig,
    params: Tree,
    layers: Iterable[tuple[Tree, int, Sequence[Tree]]],
    tokens_BT: jax.Array,
) -> UpcyclingReport:
    """Runs the layers on three hidden states: of the dense model and of the sparse ones before and after.

    layers: for each layer the block of its stack, its repeat, and the replacements of its mlp, before and after.
    Each is also compared with the dense mlp on the dense model's own hidden states.
    """
    walk = Walk(config, sparse)
    outside = {name: leaf for name, leaf in params.items() if name != "stacks"}
    xs, tokens = walk.start(outside, tokens_BT)
    found: tuple[list[Match], list[Match]] = [], []
    for (block, r, moes), window in zip(layers, config.windows, strict=True):
        xs, matches = walk.layer(block, r, moes, xs, tokens, window)
        for so_far, match in zip(found, matches, strict=True):
            so_far.append(Match(*map(float, match)))
    (loss, *losses), errors = walk.end(outside, xs, tokens_BT)
    before, after = (Kept(tuple(f), float(e), float(x)) for f, e, x in zip(found, errors, losses, strict=True))
    return UpcyclingReport(tokens_BT.size, float(loss), before, after)


class Walk:
    """The compiled steps of a forward pass through three models that share everything but the feed-forward layers."""

    def __init__(self, config: ModelConfig, sparse: ModelConfig):
        self.config = config
        self.dense, self.sparse = _one_block(config), _one_block(sparse)
        self.start, self.layer, self.end = jax.jit(self._start), jax.jit(self._layer), jax.jit(self._end)

    def _start(self, outside: Tree, tokens_BT: jax.Array):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        tokens = Tokens.locate(rope.plain(self.config), positions_BT, None, None, self.config.head_dim)
        x_BTD = take(outside["embed_VD"], tokens_BT, outside["final_norm_D"].dtype)
        return (x_BTD, x_BTD, x_BTD), tokens

    def _layer(self, block: Tree, r, moes: Sequence[Tree], xs, tokens: Tokens, window):
        """Hidden states after the layer, and the two numbers of a Match for each sparse model."""
        layer = jax.tree.map(lambda p: p[r], block)
        dense = nnx.merge(self.dense, layer)
        blocks = [nnx.merge(self.sparse, without_mlp(layer) | {"moe": moe}) for moe in moes]
        x_BTD = xs[0]
        normed_BTD = rms_norm(x_BTD, dense.attention_norm_D[...], dense.eps)
        x_BTD = x_BTD + dense.attention(normed_BTD, tokens, window, None, None)[0]
        normed_BTD = rms_norm(x_BTD, dense.mlp_norm_D[...], dense.eps)
        want_BTD = dense.mlp(normed_BTD)
        found = [_match(want_BTD, other.moe(normed_BTD, tokens.positions_BT >= 0)[0]) for other in blocks]
        after = [other(x, tokens, window, None, None)[0] for other, x in zip(blocks, xs[1:], strict=True)]
        return (x_BTD + want_BTD, *after), found

    def _end(self, outside: Tree, xs, tokens_BT: jax.Array):
        """Losses of the three models, errors of the logits of the two sparse ones."""
        head_VD = outside["embed_VD" if self.config.tie_word_embeddings else "head_VD"]
        hidden = [rms_norm(x, outside["final_norm_D"], self.config.rms_norm_eps) for x in xs]
        losses = [-token_logprobs(h[:, :-1], head_VD, tokens_BT[:, 1:]).mean() for h in hidden]
        want_BTV, *got = (matmul(h, head_VD, dtype=jnp.float32) for h in hidden)
        return losses, [_match(want_BTV, logits_BTV)[1] for logits_BTV in got]


def _one_block(config: ModelConfig) -> nnx.GraphDef:
    """The definition of a single layer; all layers of these models are alike."""
    declare_one = Declare(jax.random.key(0), dtype=jnp.float32, std=0.0)
    kind = "sparse" if config.num_experts else "dense"
    return nnx.split(nnx.eval_shape(lambda: Block(config, kind, declare_one)))[0]


def without_mlp(block: Tree) -> Tree:
    """A layer's parameters except the feed-forward ones."""
    return {name: leaf for name, leaf in block.items() if name != "mlp"}


def _match(want: jax.Array, got: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two numbers of a Match."""
    want, got = want.astype(jnp.float32), got.astype(jnp.float32)
    length2 = jnp.vdot(want, want)
    return jnp.vdot(want, got) / length2, jnp.sqrt(jnp.sum((got - want) ** 2) / length2)


def sample_tokens(source: checkpoint.Source, config: ModelConfig) -> np.ndarray:
    """Tokens [1, T] to measure on: a little prose, or random ids where the checkpoint has no tokenizer."""
    try:
        with source.folder_of_small_files() as folder:
            ids = np.asarray(Tokenizer.from_folder(folder).encode(PROSE))
    except FileNotFoundError:
        ids = np.random.default_rng(0).integers(config.vocab_size, size=256)
    return ids[None, : config.max_position_embeddings]


PROSE = """\
When the river rose in the spring of that year, the people of the lower town carried what they could up the hill. The \
baker took his scales and two sacks of flour, the schoolmaster his maps, and the children a cat that did not want to \
come. Nobody had counted on the bridge. It was made of wood, it was older than the church, and it had stood through \
every flood that anyone could remember; but on the second night the water brought down whole trees from the forest \
above, and by the morning there was nothing left of it except four posts in a row. For six weeks the only way across \
was a ferry, which a farmer called Anton pulled along a rope. He charged two coins for a person and five for a cow. \
When he was asked what he had earned, he laughed and said that it was enough to build a bridge. In fact he had \
written down every crossing in a small book: 1,412 people, 96 cows, 3 pianos. The engineer who came from the city in \
June read the book from the first page to the last, and then drew the new bridge exactly as wide as it had to be.
"""
