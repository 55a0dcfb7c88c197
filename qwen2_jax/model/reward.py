# SPDX-License-Identifier: Apache-2.0
"""A new reward model: a language model whose LM head is replaced by a score head."""

import dataclasses
from typing import cast

import jax
from flax import nnx

from qwen2_jax.config.architectures import HeadKind
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model.decoder import ScoreHead, check_head, declare
from qwen2_jax.parallel import sharding
from qwen2_jax.weights.params import Declare, ParamSpec, Tree


def from_language_model(params: Tree, config: ModelConfig, head: HeadKind, seed: int = 0) -> tuple[Tree, ModelConfig]:
    """(params, config) of a reward model with this language model's layers and a randomly initialised score head.

    params: stacked or unrolled; everything but the LM head is shared with the result, not copied. The new head's
    weights are normal and small, its biases zero: the values that `model.init` gives for the seed. Where the parameters
    are on a mesh, the head is created there, sharded as declared; inside jit, as out_shardings say. UserError for a
    reward model.
    """
    check_head(config, scores=False)
    scoring = dataclasses.replace(config, score_head=head)
    like = params["final_norm_D"]

    def place(spec: ParamSpec) -> jax.sharding.Sharding:
        where = like.sharding
        on_mesh = isinstance(where, jax.sharding.NamedSharding)
        return sharding.sharding(spec.axes, spec.shape, cast(jax.sharding.Mesh, where.mesh)) if on_mesh else where

    def fresh() -> Tree:
        declared = Declare(nnx.Rngs(seed).params(), dtype=like.dtype, std=config.initializer_range)
        return nnx.to_pure_dict(nnx.state(ScoreHead(scoring, declared)))

    if not isinstance(like, jax.core.Tracer):
        fresh = jax.jit(fresh, out_shardings=jax.tree.map(place, declare(scoring)[1]["score_head"]))
    kept = {name: value for name, value in params.items() if name != "head_VD"}
    return kept | {"score_head": fresh()}, scoring
