# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, on the devices that hold them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.kernels import grouped_matmul as _grouped
from qwen2_jax.kernels.grouped_matmul import permute, sort_by_expert, unpermute
from qwen2_jax.ops.implementations import implementation_of
from qwen2_jax.ops.per_device import axes_of_names, before_weights, on_each_device
from qwen2_jax.parallel import expert_exchange, sharding

# B batch  T query  M tokens  k experts of a token  E experts  F width of an expert


# An array [E, O, I], or (int8 [E, O, I], float32 factors [E, O]); a factor of None means none.
Matrices = jax.Array | tuple[jax.Array, jax.Array | None]


def experts(
    x_BTD: jax.Array,
    chosen_BTk: jax.Array,
    weights_BTk: jax.Array,
    gate_EFD: Matrices,
    up_EFD: Matrices,
    down_EDF: Matrices,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """sum over a token's k experts e of weight_e * down_e(silu(gate_e x) * up_e x), [B, T, D] in x's dtype.

    chosen_BTk: experts of each token; E or more means none (padding). Nothing is dropped, whatever the load. On a mesh
    every device runs the experts it holds. Where devices that hold different experts have different tokens, copies of
    tokens go to their experts and results come back, or everybody gathers all tokens and the sums are scattered
    (exchange.choose). Tokens that they all have (a decode step's few rows) stay, and the sums are added. Partial sums
    are added in float32.
    """
    x_BTD, chosen_BTk, weights_BTk = map(before_weights, (x_BTD, chosen_BTk, weights_BTk))
    matrices = [m if isinstance(m, tuple) else (m, None) for m in (gate_EFD, up_EFD, down_EDF)]
    args = (x_BTD, chosen_BTk, weights_BTk, *matrices)
    tokens = ("batch", "length", None)
    names = (tokens, tokens, tokens, ("experts", "mlp", None), ("experts", "mlp", None), ("experts", None, "mlp"))
    mesh, axes = sharding.current_mesh(), axes_of_names(args, names)
    holders, widths = axes.get("experts", ()), axes.get("mlp", ())
    apart = tuple(axis for axis in holders if axis in axes.get("batch", ()))  # axes along which tokens differ too
    name, sent = implementation_of("experts", implementation), None
    if mesh is not None and apart and apart == holders:
        devices = sharding.parts(holders, mesh)
        if exchange_of(implementation, devices, chosen_BTk.shape[-1], x_BTD.dtype.itemsize) == "all_to_all":
            sent = _Sent(name, len(matrices[0][0]), holders, tuple(mesh.axis_names))

    def run(x_BTD, chosen_BTk, weights_BTk, *matrices):
        if apart and sent is None:
            gather = lambda x: jax.lax.all_gather(x, apart, axis=0, tiled=True)  # noqa: E731
            x_BTD, chosen_BTk, weights_BTk = gather(x_BTD), gather(chosen_BTk), gather(weights_BTk)
        x_MD, chosen_Mk, weights_Mk = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, chosen_BTk, weights_BTk))
        if sent is not None:
            y_BTD = _sent(sent, x_MD, chosen_Mk, weights_Mk, *matrices).reshape(x_BTD.shape)
            return jax.lax.psum(y_BTD.astype(jnp.float32), widths).astype(y_BTD.dtype) if widths else y_BTD
        mine = len(matrices[0][0])
        if holders:  # another device's experts are none of mine: their rows cost nothing and give zeros
            chosen_Mk = chosen_Mk - jax.lax.axis_index(holders) * mine
        order = sort_by_expert(chosen_Mk, mine)
        rows = _products(name, permute(x_MD, order), matrices, order.group_sizes_E)
        y_BTD = unpermute(rows, weights_Mk, order).reshape(x_BTD.shape)
        if not holders and not widths:
            return y_BTD
        sums_BTD = y_BTD.astype(jnp.float32)
        if apart:
            sums_BTD = jax.lax.psum_scatter(sums_BTD, apart, scatter_dimension=0, tiled=True)
        elif holders:
            sums_BTD = jax.lax.psum(sums_BTD, holders)
        return (jax.lax.psum(sums_BTD, widths) if widths else sums_BTD).astype(y_BTD.dtype)

    return before_weights(on_each_device(run, args, names, tokens, name))


def exchange_of(implementation: str | None, devices: int, choices: int, itemsize: int) -> str:
    """Which of exchange.NAMES `experts` uses where so many devices have different tokens and different experts."""
    return expert_exchange.choose(implementation_of("exchange", implementation), devices, choices, itemsize)


def _products(name: str | None, rows_MD, matrices: Sequence, group_sizes_E, weights_M=None) -> jax.Array:
    """Each row through its expert, [M, D]; with weights_M times its weight."""
    (gate_EFD, gate_scale_EF), (up_EFD, up_scale_EF), (down_EDF, down_scale_ED) = matrices
    hidden_MF = _grouped.grouped_swiglu(
        rows_MD, gate_EFD, up_EFD, group_sizes_E,
        gate_scale_EF=gate_scale_EF, up_scale_EF=up_scale_EF, implementation=name,
    )  # fmt: skip
    if weights_M is not None:
        hidden_MF = (hidden_MF * weights_M[:, None]).astype(hidden_MF.dtype)
    return _grouped.grouped_matmul(
        hidden_MF, down_EDF, group_sizes_E, scale_EF=down_scale_ED, transpose_w=True, implementation=name
    )


class _Sent(NamedTuple):
    """What `_sent` has to know besides arrays."""

    name: str | None  # of the kernels
    experts: int  # E, on all devices together
    holders: tuple[str, ...]  # mesh axes over which experts and tokens are split
    everywhere: tuple[str, ...]  # all mesh axes

    def exchange(self, order, k: int) -> expert_exchange.Exchange:
        """Of rows in this order, k for each token."""
        return expert_exchange.Exchange.of(
            order.group_sizes_E, len(order.pairs_M) // k, k, self.holders, self.everywhere
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(how: _Sent, x_MD, chosen_Mk, weights_Mk, *matrices) -> jax.Array:
    """The weighted sums of one device's tokens, [M, D], through experts that other devices hold.

    matrices: gate, up and down of this device's experts. Kept for the backward pass are the arguments; it sends the
    tokens again, since what a device received is larger than what it has.
    """
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_RD = permute(x_MD, order)

    def do(part: expert_exchange.Round, done_RD):
        return part.back(_products(how.name, part.there(rows_RD), matrices, part.group_sizes_E), done_RD)

    rows_RD = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, jnp.zeros_like(rows_RD))
    return unpermute(rows_RD, weights_Mk, order)


def _sent_forward(how: _Sent, *args):
    return _sent(how, *args), args


def _sent_backward(how: _Sent, args, dout_MD):
    """One more crossing than forward: tokens and gradients of their sums go, gradients of tokens come back.

    A row's weight goes with it and multiplies between the two products, which is the same function: its gradient is
    then found where the row is, and the results need not come home again.
    """
    x_MD, chosen_Mk, weights_Mk, *matrices = args
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_RD, to_tokens = jax.vjp(lambda x_MD: permute(x_MD, order), x_MD)
    dout_RD = permute(dout_MD, order)
    weights_R = weights_Mk.reshape(-1)[order.pairs_M].astype(jnp.float32)

    def do(part: expert_exchange.Round, carry):
        drows_RD, dweights_R, *sums = carry

        def product(rows_CD, weights_C, *trained):
            return _products(how.name, rows_CD, trained or matrices, part.group_sizes_E, weights_C)

        _, pull = jax.vjp(product, part.there(rows_RD), part.numbers_there(weights_R), *trained)
        drows_CD, dweights_C, *more = pull(part.there(dout_RD))
        # An expert's rows are together in one window, or in a few that follow each other: few terms for each sum.
        sums = jax.tree.map(jnp.add, sums, more)
        return [part.back(drows_CD, drows_RD), part.numbers_back(dweights_C, dweights_R), *sums]

    trained = matrices if matrices[0][1] is None else []  # int8 is a constant
    nothing = jax.tree.map(jnp.zeros_like, [rows_RD, weights_R, *trained])
    drows_RD, dweights_R, *dmatrices = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, nothing)
    dweights_Mk = dweights_R[order.rows_TK].astype(weights_Mk.dtype)
    return (*to_tokens(drows_RD), None, dweights_Mk, *(dmatrices or (None,) * 3))


_sent.defvjp(_sent_forward, _sent_backward)
