# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's model run one layer at a time over tokens that are all known: large models in little memory.

In memory are one layer's parameters, or the embedding, and the activations of all tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen2_jax.checkpoint.api import open_checkpoint
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.sources import Source
from qwen2_jax.checkpoint.transfer.load import param_shardings
from qwen2_jax.config.layer_scans import LayerScan
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model import decoder
from qwen2_jax.model.attention import Tokens
from qwen2_jax.model.kv_cache import LayerCache
from qwen2_jax.model.rope import plain
from qwen2_jax.weights import weight
from qwen2_jax.weights.forms import form_of
from qwen2_jax.weights.params import Tree, leaves
from qwen2_jax.weights.weight import Weight

# N sequences  T tokens of each  D model width  V vocabulary

BATCH_TOKENS = 4096  # tokens that go through a layer together


class ByLayer:
    """A language model of a checkpoint, a layer at a time.

    name: see checkpoint.locate. dtype: of the computation and of the weights; or a form in weights.forms.FORMS of the
    weight matrices, with everything else in float32. cache_dtype: keys and values are rounded as a cache of this dtype
    rounds them; None: not at all.
    """

    def __init__(self, name: str | Path | Source, dtype: str = "float32", cache_dtype: str | None = None):
        self.opened = open_checkpoint(name)
        self.config, self.form = self.opened.config, form_of(dtype)
        self.dtype = jnp.dtype("float32" if self.form else dtype)
        self.cache_dtype = cache_dtype
        decoder.check_head(self.config, scores=False)
        specs = names.unrolled(self.opened.specs)
        typed = {path: dataclasses.replace(spec, dtype=self.dtype) for path, spec in leaves(specs)}
        self.specs: Tree = names.nested(typed)

    def read(self, specs: Tree) -> Tree:
        """The parameters that a part of self.specs declares, on the first device."""
        return self.opened.tensors.read_params(specs, param_shardings(None), form=self.form)

    def layer(self, i: int) -> Tree:
        """The parameters of layer i, each with a leading dimension of 1."""
        return self.read({"stacks": {i: self.specs["stacks"][i]}})["stacks"][i]

    def run(self, i: int, params: Tree, x_NTD: np.ndarray) -> None:
        """Replaces the activations by those after layer i."""
        graph = layer_graph(self.config, i)
        for rows in batches(x_NTD):
            x_NTD[rows] = np.asarray(_run(graph, self.config, params, x_NTD[rows], self.cache_dtype))

    def embedded(self, tokens_NT: np.ndarray) -> np.ndarray:
        """The activations before the first layer, [N, T, D]."""
        table_VD = self.read({"embed_VD": self.specs["embed_VD"]})["embed_VD"]
        x_NTD = np.empty((*tokens_NT.shape, self.config.hidden_size), self.dtype)
        for rows in batches(x_NTD):
            x_NTD[rows] = np.asarray(weight.take(table_VD, jnp.asarray(tokens_NT[rows]), self.dtype))
        return x_NTD

    def normed(self, x_NTD: np.ndarray) -> None:
        """Replaces the activations after the last layer by the hidden states, after the final norm."""
        norm_D = self.read({"final_norm_D": self.specs["final_norm_D"]})["final_norm_D"]
        for rows in batches(x_NTD):
            x_NTD[rows] = np.asarray(decoder.rms_norm(jnp.asarray(x_NTD[rows]), norm_D, self.config.rms_norm_eps))

    def hidden(self, tokens_NT: np.ndarray, progress: Callable[[int, int], Any] | None = None) -> np.ndarray:
        """The hidden states of int32 tokens, after the final norm, [N, T, D]. progress: (layers done, layers)."""
        x_NTD = self.embedded(tokens_NT)
        for i in range(self.config.num_hidden_layers):
            self.run(i, self.layer(i), x_NTD)
            if progress is not None:
                progress(i + 1, self.config.num_hidden_layers)
        self.normed(x_NTD)
        return x_NTD

    def head(self) -> Weight:
        """The output head's weight [V, D]: the embedding where it is tied."""
        name = "embed_VD" if self.config.tie_word_embeddings else "head_VD"
        return self.read({name: self.specs[name]})[name]


def batches(x_NTD: np.ndarray) -> list[slice]:
    """The sequences in parts of about BATCH_TOKENS tokens."""
    N, T, _ = x_NTD.shape
    step = max(1, BATCH_TOKENS // T)
    return [slice(start, min(N, start + step)) for start in range(0, N, step)]


def layer_graph(config: ModelConfig, i: int) -> nnx.GraphDef:
    """The module of layer i without arrays; the same one for layers that differ in their weights alone."""
    kinds = [(config.is_sparse(j), config.windows[j]) for j in range(config.num_hidden_layers)]
    return _layer_graph(config, kinds.index(kinds[i]))


@functools.lru_cache(maxsize=64)
def _layer_graph(config: ModelConfig, i: int) -> nnx.GraphDef:
    plan = LayerScan(("sparse" if config.is_sparse(i) else "dense",), i, 1)
    return nnx.split(nnx.eval_shape(lambda: decoder.Stack(config, plan, jax.random.key(0), jnp.float32)))[0]


def apply_layer(
    graph: nnx.GraphDef, config: ModelConfig, params: Tree, x_NTD: jax.Array, cache_dtype: str | None = None
) -> jax.Array:
    """The activations after one layer, for tokens at the positions 0 to T - 1. cache_dtype: see ByLayer."""
    N, T, _ = x_NTD.shape
    positions_NT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (N, T))
    tokens = Tokens.locate(plain(config), positions_NT, None, None, config.head_dim)
    caches = None if cache_dtype is None else (LayerCache.zeros(config, 1, N, T, jnp.dtype(cache_dtype)),)
    stack: Any = nnx.merge(graph, params)
    return stack(x_NTD, tokens, caches, None)[0]


_run = jax.jit(apply_layer, static_argnums=(0, 1, 4))
