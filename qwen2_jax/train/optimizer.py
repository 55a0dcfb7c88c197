# SPDX-License-Identifier: Apache-2.0
"""Optimizers as optax transformations, read from the parameters' declarations."""

import math

import jax
import optax

from qwen2_jax.params import ParamSpec, Tree
from qwen2_jax.train.config import Optim


def schedule(peak: float, optim: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, flat at `peak`, then a straight fall over the last share `optim.fall` of the steps.

    Flat in the middle, so that a run can be made longer before its fall has begun (Hu et al. 2024, arXiv:2404.06395).
    """
    fall = max(1, round(optim.fall * steps))
    warmup = min(optim.warmup, steps - fall)
    parts = [
        optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1)),
        optax.linear_schedule(peak, peak * optim.final, fall),
    ]
    return optax.join_schedules(parts, [steps - fall])


def make(optim: Optim, specs: Tree, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW; with optim.muon, Muon for the matrices inside layers. Decay touches matrices only."""
    decay = jax.tree.map(lambda s: s.decay, specs, is_leaf=_is_spec)
    lr = schedule(optim.lr, optim, steps)
    clip = optax.clip_by_global_norm(optim.clip)
    adamw = optax.adamw(lr, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.decay, mask=decay)
    if optim.muon is None:
        return optax.chain(clip, adamw)
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=optim.muon.momentum,
            weight_dimension_numbers=jax.tree.map(lambda s: matrix(s) or optax.MaskedNode(), specs, is_leaf=_is_spec),
        ),
        optax.add_decayed_weights(optim.decay),
        optax.scale_by_learning_rate(schedule(optim.muon.lr, optim, steps)),
    )
    labels = jax.tree.map(lambda s: "adamw" if matrix(s) is None else "muon", specs, is_leaf=_is_spec)
    return optax.chain(clip, optax.partition({"adamw": adamw, "muon": muon}, labels))


def matrix(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers | None:
    """How a layer's weight is a matrix [outputs, inputs], as in the file; None for embeddings, norms and biases.

    Stacked layers and experts are batches of matrices: each is orthogonalised by itself.
    """
    if not (spec.decay and spec.layers and len(spec.hf_shape) == 2):
        return None
    first = 1 + ("{e}" in spec.hf)
    split = first
    while math.prod(spec.shape[first:split]) < spec.hf_shape[0]:
        split += 1
    if split == first or split == len(spec.shape):
        return None  # a single row, such as the shared expert's gate
    return optax.contrib.MuonDimensionNumbers(tuple(range(split, len(spec.shape))), tuple(range(first, split)))


def _is_spec(leaf) -> bool:
    return isinstance(leaf, ParamSpec)
