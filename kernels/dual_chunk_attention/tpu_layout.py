# SPDX-License-Identifier: Apache-2.0
"""The layout of tpu.py's operands: heads first, lengths padded to whole blocks, per-token numbers along lanes.

Pallas tiles the last two dimensions of an array, so these are tokens and head width, and per-query numbers form one
long row. XLA makes these copies before and after the kernels.

B batch, T query length, S key length, N query heads, K kv heads, G = N // K, H head width, A rotations of the query; I
query blocks of block_q tokens, X = G * block_q; U integers per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..masks import Masks, Tokens


class Queries(NamedTuple):
    q_ABKGTH: jax.Array
    at_ABUT: jax.Array  # spans of a query in each rotation, and its segment
    tokens: Tokens


class Keys(NamedTuple):
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    at_BUS: jax.Array  # position, and segment
    tokens: Tokens


def query_side(rotations, masks: Masks, K, block_q) -> Queries:
    rotations, tokens = pad((rotations, masks.q), block_q)
    at_ABUT = jnp.stack([_numbers(*span, tokens.segments) for span in masks._replace(q=tokens).spans()])
    return Queries(jnp.stack([heads_first(q, K) for q in rotations]), at_ABUT, tokens)


def key_side(k, v, tokens: Tokens, block_k) -> Keys:
    k, v, tokens = pad((k, v, tokens), block_k)
    return Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), _numbers(*tokens), tokens)


def _numbers(*numbers):
    """Stacks those that are not None: int32 [B, U, tokens]."""
    return jnp.stack([x for x in numbers if x is not None], axis=1).astype(jnp.int32)


def pad(tree, block):
    """Pads arrays [B, tokens, ...] to whole blocks: floats with 0; positions and segments with -1, which is padding."""

    def filled(x):
        missing = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, missing, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)

    return jax.tree.map(filled, tree)


def heads_first(x_BTNH, K):
    """[B, T, N, H] -> [B, K, G, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def tokens_first(x_BKGTH):
    """[B, K, G, T, H] -> [B, T, N, H]."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def per_row(x_BTN, K, block_q):
    """[B, T, N] -> [B, K, I, 1, X]."""
    B, T, N = x_BTN.shape
    x = x_BTN.reshape(B, T // block_q, block_q, K, N // K).transpose(0, 3, 1, 4, 2)
    return x.reshape(B, K, T // block_q, 1, -1)


def per_token(x_BKI1X, block_q):
    """[B, K, I, 1, X] -> [B, T, N]."""
    B, K, I, _, X = x_BKI1X.shape
    return x_BKI1X.reshape(B, K, I, X // block_q, block_q).transpose(0, 2, 4, 1, 3).reshape(B, I * block_q, -1)


def in_slabs(count, block, function, cut):
    """function(cut) for `count` slabs of the arrays [B, tokens, ...] in `cut`, one after another; results likewise."""
    if count == 1:
        return function(cut)
    length = jax.tree.leaves(cut)[0].shape[1]
    slab = -(-length // (count * block)) * block

    def apart(x):
        return x.reshape(x.shape[0], count, slab, *x.shape[2:]).swapaxes(0, 1)

    def together(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], count * slab, *x.shape[3:])[:, :length]

    return jax.tree.map(together, lax.map(function, jax.tree.map(apart, pad(cut, count * slab))))
