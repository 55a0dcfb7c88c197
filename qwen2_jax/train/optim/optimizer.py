# SPDX-License-Identifier: Apache-2.0
"""Optimizers as optax transformations, read from the parameters' declarations."""

import math
from typing import TYPE_CHECKING

import jax
import optax

from qwen2_jax.train.optim.online_merging import online_merging, scale_by_early_epsilon
from qwen2_jax.weights.params import ParamSpec, Tree, is_spec

if TYPE_CHECKING:
    from qwen2_jax.train.config import Optim


def schedule(peak: float, optim: "Optim", steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warm-up from 0 over optim.warmup steps, then by optim.schedule.

    "constant"; "linear" or "cosine" down to peak * optim.final, which a step after the last would have; "wsd": flat,
    then a straight fall over the last share optim.fall of the steps, so that a run can be made longer before its fall
    has begun (Hu et al. 2024, arXiv:2404.06395).
    """
    warmup = min(optim.warmup, steps - 1)
    after = steps - warmup
    last = peak * optim.final
    match optim.schedule:
        case "constant":
            body = optax.constant_schedule(peak)
        case "linear":
            body = optax.linear_schedule(peak, last, after)
        case "cosine":
            body = optax.cosine_decay_schedule(peak, after, alpha=optim.final)
        case "wsd":
            fall = min(max(1, round(optim.fall * steps)), after)
            body = optax.linear_schedule(peak, last, fall, transition_begin=after - fall)
        case unknown:
            raise ValueError(f"no schedule {unknown!r}")
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def make(optim: "Optim", specs: Tree, steps: int, seed: int = 0) -> optax.GradientTransformation:
    """Clipping, then AdamW or Adafactor; with optim.muon, Muon for the matrices inside layers.

    Weight decay is decoupled (Loshchilov & Hutter 2019), multiplied by the learning rate, and touches matrices only.
    optim.merging stands last, and decays itself. seed: of its masks.
    """
    rate = schedule(optim.lr, optim, steps)
    clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    if optim.merging is not None:
        adam = scale_by_early_epsilon if optim.merging.variant == "code" else optax.scale_by_adam
        return optax.chain(
            clip,
            adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
            optax.scale_by_learning_rate(rate),
            online_merging(optim.merging, specs, rate, decay=optim.decay, eps=optim.eps, seed=seed),
        )
    decay = jax.tree.map(lambda s: s.decay, specs, is_leaf=is_spec)
    if optim.algorithm == "adafactor":
        scale = optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30)
        scale = optax.chain(scale, optax.clip_by_block_rms(1.0))  # Shazeer & Stern 2018 (arXiv:1804.04235), sec. 6
    else:
        scale = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    base = optax.chain(scale, optax.add_decayed_weights(optim.decay, mask=decay), optax.scale_by_learning_rate(rate))
    if optim.muon is None:
        return optax.chain(clip, base)
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=optim.muon.momentum,
            weight_dimension_numbers=jax.tree.map(lambda s: matrix(s) or optax.MaskedNode(), specs, is_leaf=is_spec),
        ),
        optax.add_decayed_weights(optim.decay),
        optax.scale_by_learning_rate(schedule(optim.muon.lr, optim, steps)),
    )
    adamw = optax.adamw(rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.decay, mask=decay)
    labels = jax.tree.map(lambda s: "adamw" if matrix(s) is None else "muon", specs, is_leaf=is_spec)
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
