# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers; on a mesh, each device runs the experts it holds."""

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
# r, c: see parallel/expert_exchange.py


# An array [E, O, I], or (it, factors, offsets): of integers float32 factors [E, O] of outputs, or factors and perhaps
# offsets [E, O, G] of groups of inputs.
Matrices = jax.Array | tuple[jax.Array, jax.Array | None, jax.Array | None]


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
    tokens are sent to their experts and results are sent back, or every device gathers all tokens and the sums are
    scattered (expert_exchange.choose). Tokens that all devices have (a decode step's few rows) are not sent; their
    results are summed over devices. Partial sums are added in float32.
    """
    x_BTD, chosen_BTk, weights_BTk = map(before_weights, (x_BTD, chosen_BTk, weights_BTk))
    matrices = [m if isinstance(m, tuple) else (m, None, None) for m in (gate_EFD, up_EFD, down_EDF)]
    args = (x_BTD, chosen_BTk, weights_BTk, *matrices)
    tokens = ("batch", "length", None)
    names = (tokens, tokens, tokens, ("experts", "mlp", None), ("experts", "mlp", None), ("experts", None, "mlp"))
    mesh, axes = sharding.current_mesh(), axes_of_names(args, names)
    holders, widths = axes.get("experts", ()), axes.get("mlp", ())
    apart = tuple(axis for axis in holders if axis in axes.get("batch", ()))  # axes that tokens are sharded over too
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
        if holders:  # other devices' experts are out of range here: their rows are skipped and give zeros
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
    """Which of expert_exchange.NAMES `experts` uses on `devices` devices with different tokens and experts."""
    return expert_exchange.choose(implementation_of("exchange", implementation), devices, choices, itemsize)


def _products(name: str | None, rows_MD, matrices: Sequence, group_sizes_E, weights_M=None) -> jax.Array:
    """Each row through its expert, [M, D]; with weights_M times its weight."""
    gate_EFD, up_EFD, down_EDF = (m[0] if m[1] is None else _grouped.Scaled(*m) for m in matrices)
    hidden_MF = _grouped.grouped_swiglu(rows_MD, gate_EFD, up_EFD, group_sizes_E, implementation=name)
    if weights_M is not None:
        hidden_MF = (hidden_MF * weights_M[:, None]).astype(hidden_MF.dtype)
    return _grouped.grouped_matmul(hidden_MF, down_EDF, group_sizes_E, transpose_w=True, implementation=name)


class _Sent(NamedTuple):
    """The static arguments of `_sent`."""

    name: str | None  # of the kernels
    experts: int  # E, on all devices together
    holders: tuple[str, ...]  # mesh axes over which experts and tokens are sharded
    everywhere: tuple[str, ...]  # all mesh axes

    def exchange(self, order, k: int) -> expert_exchange.Exchange:
        """Of rows in this order, k for each token."""
        return expert_exchange.Exchange.of(
            order.group_sizes_E, len(order.pairs_M) // k, k, self.holders, self.everywhere
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(how: _Sent, x_MD, chosen_Mk, weights_Mk, *matrices) -> jax.Array:
    """The weighted sums of one device's tokens, [M, D], through experts that other devices hold.

    matrices: gate, up and down of this device's experts. The arguments are saved for the backward pass, which
    sends the tokens again, because a device receives more rows than it has tokens.
    """
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_rD = permute(x_MD, order)

    def do(part: expert_exchange.Round, done_rD):
        return part.back(_products(how.name, part.there(rows_rD), matrices, part.group_sizes_E), done_rD)

    rows_rD = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, jnp.zeros_like(rows_rD))
    return unpermute(rows_rD, weights_Mk, order)


def _sent_forward(how: _Sent, *args):
    return _sent(how, *args), args


def _sent_backward(how: _Sent, args, dout_MD):
    """One more exchange than forward: tokens and the gradients of their sums are sent, gradients of tokens are sent
    back.

    A row's weight is sent with it and applied between the two products, which is the same function: its gradient is
    then computed on the device of the expert, and the results need not be sent back.
    """
    x_MD, chosen_Mk, weights_Mk, *matrices = args
    order = sort_by_expert(chosen_Mk, how.experts)
    rows_rD, to_tokens = jax.vjp(lambda x_MD: permute(x_MD, order), x_MD)
    dout_rD = permute(dout_MD, order)
    weights_r = weights_Mk.reshape(-1)[order.pairs_M].astype(jnp.float32)

    def do(part: expert_exchange.Round, carry):
        drows_rD, dweights_r, *sums = carry

        def product(rows_cD, weights_c, *trained):
            return _products(how.name, rows_cD, trained or matrices, part.group_sizes_E, weights_c)

        _, pull = jax.vjp(product, part.there(rows_rD), part.numbers_there(weights_r), *trained)
        drows_cD, dweights_c, *more = pull(part.there(dout_rD))
        # An expert's rows are in one window or in a few consecutive ones, so each sum has few terms.
        sums = jax.tree.map(jnp.add, sums, more)
        return [part.back(drows_cD, drows_rD), part.numbers_back(dweights_c, dweights_r), *sums]

    trained = matrices if matrices[0][1] is None else []  # integers are constants
    nothing = jax.tree.map(jnp.zeros_like, [rows_rD, weights_r, *trained])
    drows_rD, dweights_r, *dmatrices = how.exchange(order, chosen_Mk.shape[1]).over_rounds(do, nothing)
    dweights_Mk = dweights_r[order.rows_Tk].astype(weights_Mk.dtype)
    return (*to_tokens(drows_rD), None, dweights_Mk, *(dmatrices or (None,) * 3))


_sent.defvjp(_sent_forward, _sent_backward)
