# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and cross-entropy of given tokens, without ever holding the logits of all positions.

The output head is the largest product of a small model, and its logits the largest array of any: 8,192 positions of a
vocabulary of 151,936 are 5 GB in float32, several times over in the backward pass. Here a chunk of positions goes
through the head at a time. The positions of a row are cut, never the batch: on a mesh (sharding.on) each device
computes its own tokens with the whole head, and the head's gradient is summed over devices once, not once per chunk.
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

# B batch  T query  D model  V vocabulary  n chunk  c position of a chunk

CHUNK = 768  # rows (batch times positions) of logits at a time on a device: 0.5 GB of float32 for a vocabulary of 152k


def token_logprobs(
    hidden_BTD: jax.Array, head_VD: Weight, targets_BT: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> jax.Array:
    """log p(target | hidden) in nats, float32 [B, T], of the logits divided by `temperature`, which is above 0.

    Logits exist for about `chunk` rows at a time, in the forward and in the backward pass (which computes them again,
    because the gradients of the results are not known before), so memory does not grow with the number of tokens.
    """

    def own(axes, hidden_BTD, head_VD, targets_BT):
        @jax.checkpoint
        def one(hidden_BcD, targets_Bc):
            logits_BcV = matmul(hidden_BcD, head_VD, dtype=jnp.float32) / temperature
            return _picked(logits_BcV, targets_Bc) - jax.nn.logsumexp(logits_BcV, axis=-1)

        logprobs_nBc = jax.lax.map(lambda args: one(*args), _cut((hidden_BTD, targets_BT), chunk))
        return _whole(logprobs_nBc, targets_BT.shape[1])

    return _on_own_tokens(own, hidden_BTD, head_VD, targets_BT, per_token=True)


class TokenSums(NamedTuple):
    """Sums over targets, float32 scalars, each target counting as often as its weight says.

    loss is differentiable; the others are metrics. Sums of shards and micro-batches add up to the sums of the
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
    weight 0 may hold any values, also infinite or not-a-number.

    Under differentiation the forward pass makes the gradients too, chunk by chunk, and the backward pass only scales
    them: a sum's gradient does not depend on what comes later, so the logits need not be computed twice (three products
    with the head instead of four). Those gradients are in float32 for the head, in its own dtype for the hidden state.
    """

    def own(axes, *args):
        sums = _cross_entropy((float(z_loss), chunk), *args)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums) if axes else sums

    return _on_own_tokens(own, hidden_BTD, head_VD, targets_BT, weights_BT.astype(jnp.float32), per_token=False)


def _on_own_tokens(run: Callable, hidden_BTD, head_VD: Weight, *of_BT, per_token: bool):
    """run(axes, hidden_BTD, head_VD, *of_BT), on a mesh with each device's tokens.

    axes: mesh axes that the tokens are sharded over, () for none. XLA handles the others: the head may be sharded over
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
        hidden_BcD, targets_Bc, weights_Bc = inputs
        more, _ = _tile(_counting(hidden_BcD, weights_Bc), targets_Bc, weights_Bc, head_VD, z_loss)
        return jax.tree.map(jnp.add, sums, more), None

    return jax.lax.scan(one, _no_sums(), _cut((hidden_BTD, targets_BT, weights_BT), chunk))[0]


def _forward(options, hidden_BTD, head_VD, targets_BT, weights_BT):
    z_loss, chunk = options

    def one(carry, inputs):
        sums, dhead_VD = carry
        hidden_BcD, targets_Bc, weights_Bc = inputs
        hidden_BcD = _counting(hidden_BcD, weights_Bc)
        more, dlogits_BcV = _tile(hidden_BcD, targets_Bc, weights_Bc, head_VD, z_loss)
        dlogits_BcV = dlogits_BcV.astype(hidden_BcD.dtype)
        dhidden_BcD = jnp.einsum("bcv,vd->bcd", dlogits_BcV, head_VD, preferred_element_type=jnp.float32)
        dhead_VD += jnp.einsum("bcv,bcd->vd", dlogits_BcV, hidden_BcD, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, more), dhead_VD), dhidden_BcD.astype(hidden_BcD.dtype)

    start = _no_sums(), jnp.zeros(head_VD.shape, jnp.float32)
    (sums, dhead_VD), dhidden_nBcD = jax.lax.scan(one, start, _cut((hidden_BTD, targets_BT, weights_BT), chunk))
    return sums, (_whole(dhidden_nBcD, targets_BT.shape[1]), dhead_VD, head_VD[:0], targets_BT)


def _backward(options, residuals, cotangents):
    dhidden_BTD, dhead_VD, like_head, targets_BT = residuals
    scale = cotangents.loss
    nothing = np.zeros(targets_BT.shape, jax.dtypes.float0), jnp.zeros(targets_BT.shape, jnp.float32)
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), (dhead_VD * scale).astype(like_head.dtype), *nothing


_cross_entropy.defvjp(_forward, _backward)


def _counting(hidden_BcD, weights_Bc):
    """Zeros where the weight is zero: 0 times infinity would spoil the sums and the head's gradient."""
    return jnp.where(weights_Bc[..., None] > 0, hidden_BcD, 0)


def _tile(hidden_BcD, targets_Bc, weights_Bc, head_VD, z_loss):
    """(sums of a chunk, gradient of its loss with respect to its logits)."""
    logits_BcV = matmul(hidden_BcD, head_VD, dtype=jnp.float32)
    lse_Bc = jax.nn.logsumexp(logits_BcV, axis=-1)
    picked_Bc = _picked(logits_BcV, targets_Bc)
    nll_Bc = lse_Bc - picked_Bc
    p_BcV = jnp.exp(logits_BcV - lse_Bc[..., None])
    mine_BcV = jnp.arange(logits_BcV.shape[-1]) == targets_Bc[..., None]
    dlogits_BcV = weights_Bc[..., None] * (p_BcV * (1 + 2 * z_loss * lse_Bc[..., None]) - mine_BcV)
    sums = TokenSums(
        loss=jnp.sum(weights_Bc * (nll_Bc + z_loss * lse_Bc**2)),
        nll=jnp.sum(weights_Bc * nll_Bc),
        correct=jnp.sum(weights_Bc * (picked_Bc >= logits_BcV.max(-1))),
        weight=jnp.sum(weights_Bc),
    )
    return sums, dlogits_BcV


def _no_sums() -> TokenSums:
    return TokenSums(*[jnp.zeros((), jnp.float32)] * len(TokenSums._fields))


def _picked(logits_BcV, targets_Bc):
    return jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]


def _cut(arrays, chunk: int):
    """[B, T, ...] -> [n, B, c, ...] with B * c at most `chunk` (one position at least), filled up with zeros."""
    B, T = arrays[0].shape[:2]
    n = -(-T // max(1, chunk // B))
    C = -(-T // n)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, n, C, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _whole(x_nBc, T: int):
    """[n, B, c, ...] -> [B, T, ...]."""
    n, B, C = x_nBc.shape[:3]
    return x_nBc.swapaxes(0, 1).reshape(B, n * C, *x_nBc.shape[3:])[:, :T]
