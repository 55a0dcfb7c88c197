# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and cross-entropy of given tokens, without ever holding the logits of all positions.

The output head is the largest product of a small model, and its logits the largest array of any: 8,192 positions of a
vocabulary of 151,936 are 5 GB in float32, several times over in the backward pass. Here a chunk of positions goes
through the head at a time. The positions of a row are cut, never the batch: on a mesh (sharding.on) each device takes
the tokens it has, with the whole head, and the head's gradient is summed over devices once, not chunk by chunk.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qwen2_jax.parallel import sharding
from qwen2_jax.weights.weight import Weight, matmul

# B batch  T query  D model  V vocabulary  n chunks  C positions of one chunk

CHUNK = 768  # rows (batch times positions) of logits at a time on a device: 0.5 GB of float32 for 152k words


def token_logprobs(
    hidden_BTD: jax.Array, head_VD: Weight, targets_BT: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> jax.Array:
    """log p(target | hidden) in nats, float32 [B, T], of the logits divided by `temperature`, which is above 0.

    Logits exist for about `chunk` rows at a time, in the forward and in the backward pass (which computes them again,
    because the gradients of the results are not known before), so memory does not grow with the number of tokens.
    """

    def own(axes, hidden_BTD, head_VD, targets_BT):
        @jax.checkpoint
        def one(hidden_BCD, targets_BC):
            logits_BCV = matmul(hidden_BCD, head_VD, dtype=jnp.float32) / temperature
            return _picked(logits_BCV, targets_BC) - jax.nn.logsumexp(logits_BCV, axis=-1)

        logprobs_nBC = jax.lax.map(lambda args: one(*args), _cut((hidden_BTD, targets_BT), chunk))
        return _whole(logprobs_nBC, targets_BT.shape[1])

    return _on_own_tokens(own, hidden_BTD, head_VD, targets_BT, per_token=True)


class TokenSums(NamedTuple):
    """Sums over targets, float32 scalars, each target counting as often as its weight says.

    loss is differentiable; the others are for looking at. Sums of shards and micro-batches add up to the sums of the
    whole; divide by `weight` only after everything has been added.
    """

    loss: jax.Array  # of nll + z_loss * lse^2
    nll: jax.Array  # nats
    correct: jax.Array  # targets that have the largest logit
    weight: jax.Array


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> TokenSums:
    """Sum over targets of weight * (-log p(target | hidden) + z_loss * lse^2), with lse = log sum exp of the logits.

    z_loss keeps the logits from drifting (Chowdhery et al. 2022, arXiv:2204.02311, sec. 5, with 1e-4). Positions of
    weight 0 may hold anything, also what is not finite.

    Under differentiation the forward pass makes the gradients too, chunk by chunk, and the backward pass only scales
    them: a sum's gradient does not depend on what comes later, so the logits need not be computed twice (three products
    with the head instead of four). Those gradients are in float32 for the head, in its own dtype for the hidden state.
    """

    def own(axes, *args):
        sums = _cross_entropy((float(z_loss), chunk), *args)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums) if axes else sums

    return _on_own_tokens(own, hidden_BTD, head_VD, targets_BT, weights_BT.astype(jnp.float32), per_token=False)


def _on_own_tokens(run: Callable, hidden_BTD, head_VD: Weight, *of_BT, per_token: bool):
    """run(axes, hidden_BTD, head_VD, *of_BT), on a mesh with each device's share of the tokens.

    axes: those that the tokens are split over, () where they are not. Other axes stay XLA's: the head may be split over
    its vocabulary. per_token: the result is [B, T], else it must be the same on all devices.
    """
    mesh = sharding.current_mesh()
    B, T, _ = hidden_BTD.shape
    rows = () if mesh is None else sharding.dividing("batch", B, mesh)
    places = () if mesh is None else sharding.dividing("length", T, mesh)
    axes = (*rows, *places)
    run = functools.partial(run, axes)
    if axes:
        tokens, whole = PartitionSpec(rows or None, places or None), PartitionSpec()
        run = jax.shard_map(
            run, mesh=mesh, axis_names=set(axes), in_specs=(tokens, whole, *(tokens for _ in of_BT)),
            out_specs=tokens if per_token else whole, check_vma=False,
        )  # fmt: skip
    return run(hidden_BTD, head_VD, *of_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden_BTD, head_VD, targets_BT, weights_BT) -> TokenSums:
    z_loss, chunk = options

    def one(sums, inputs):
        hidden_BCD, targets_BC, weights_BC = inputs
        more, _ = _tile(_counting(hidden_BCD, weights_BC), targets_BC, weights_BC, head_VD, z_loss)
        return jax.tree.map(jnp.add, sums, more), None

    return jax.lax.scan(one, _no_sums(), _cut((hidden_BTD, targets_BT, weights_BT), chunk))[0]


def _forward(options, hidden_BTD, head_VD, targets_BT, weights_BT):
    z_loss, chunk = options

    def one(carry, inputs):
        sums, dhead_VD = carry
        hidden_BCD, targets_BC, weights_BC = inputs
        hidden_BCD = _counting(hidden_BCD, weights_BC)
        more, dlogits_BCV = _tile(hidden_BCD, targets_BC, weights_BC, head_VD, z_loss)
        dlogits_BCV = dlogits_BCV.astype(hidden_BCD.dtype)
        dhidden_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, head_VD, preferred_element_type=jnp.float32)
        dhead_VD += jnp.einsum("bcv,bcd->vd", dlogits_BCV, hidden_BCD, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, more), dhead_VD), dhidden_BCD.astype(hidden_BCD.dtype)

    start = _no_sums(), jnp.zeros(head_VD.shape, jnp.float32)
    (sums, dhead_VD), dhidden_nBCD = jax.lax.scan(one, start, _cut((hidden_BTD, targets_BT, weights_BT), chunk))
    return sums, (_whole(dhidden_nBCD, targets_BT.shape[1]), dhead_VD, head_VD[:0], targets_BT)


def _backward(options, residuals, cotangents):
    dhidden_BTD, dhead_VD, like_head, targets_BT = residuals
    scale = cotangents.loss
    nothing = np.zeros(targets_BT.shape, jax.dtypes.float0), jnp.zeros(targets_BT.shape, jnp.float32)
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), (dhead_VD * scale).astype(like_head.dtype), *nothing


_cross_entropy.defvjp(_forward, _backward)


def _counting(hidden_BCD, weights_BC):
    """Zeros where the weight is zero: 0 times what is not finite would reach the sums and the head's gradient."""
    return jnp.where(weights_BC[..., None] > 0, hidden_BCD, 0)


def _tile(hidden_BCD, targets_BC, weights_BC, head_VD, z_loss):
    """(sums of a chunk, gradient of its loss with respect to its logits)."""
    logits_BCV = matmul(hidden_BCD, head_VD, dtype=jnp.float32)
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = _picked(logits_BCV, targets_BC)
    nll_BC = lse_BC - picked_BC
    p_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
    mine_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
    dlogits_BCV = weights_BC[..., None] * (p_BCV * (1 + 2 * z_loss * lse_BC[..., None]) - mine_BCV)
    sums = TokenSums(
        loss=jnp.sum(weights_BC * (nll_BC + z_loss * lse_BC**2)),
        nll=jnp.sum(weights_BC * nll_BC),
        correct=jnp.sum(weights_BC * (picked_BC >= logits_BCV.max(-1))),
        weight=jnp.sum(weights_BC),
    )
    return sums, dlogits_BCV


def _no_sums() -> TokenSums:
    return TokenSums(*[jnp.zeros((), jnp.float32)] * len(TokenSums._fields))


def _picked(logits_BCV, targets_BC):
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]


def _cut(arrays, chunk: int):
    """[B, T, ...] -> [n, B, C, ...] with B * C at most `chunk` (one position at least), filled up with zeros."""
    B, T = arrays[0].shape[:2]
    n = -(-T // max(1, chunk // B))
    C = -(-T // n)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, n, C, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _whole(x_nBC, T: int):
    """[n, B, C, ...] -> [B, T, ...]."""
    n, B, C = x_nBC.shape[:3]
    return x_nBC.swapaxes(0, 1).reshape(B, n * C, *x_nBC.shape[3:])[:, :T]
