# SPDX-License-Identifier: Apache-2.0
"""Matrix products of a mixture of experts: rows sorted by expert, each group times its own expert's matrix.

order = sort_by_expert(experts_Tk, num_experts)
x_MD = permute(x_TD, order)
h_MF = grouped_swiglu(x_MD, gate_EFD, up_EFD, order.group_sizes_E)
y_MD = grouped_matmul(h_MF, down_EDF, order.group_sizes_E, transpose_w=True)
y_TD = unpermute(y_MD, weights_Tk, order)
"""

import jax.numpy as jnp
from jax.experimental import checkify

from ..dispatch import dispatch, late
from ..target import require
from . import reference, xla
from .gradients import Scaled
from .order import Order, permute, sort_by_expert, unpermute

__all__ = ["Order", "Scaled", "grouped_matmul", "grouped_swiglu", "permute", "sort_by_expert", "unpermute"]


def _no_integers(module, function, platform=None):
    """`late` for an implementation that takes no Scaled matrices."""
    run = late(f"{__name__}.{module}", function, platform)

    def checked(x_MD, *args, **kwargs):
        if any(isinstance(arg, Scaled) for arg in args):
            if platform is not None:
                require(platform)
            raise NotImplementedError("takes no matrices of integers")
        return run(x_MD, *args, **kwargs)

    return checked


IMPLEMENTATIONS = {  # fastest first
    "gpu": late(f"{__name__}.gpu", "grouped_matmul", "gpu"),
    "tpu": late(f"{__name__}.tpu", "grouped_matmul", "tpu"),
    "xla": xla.grouped_matmul,
    "reference": reference.grouped_matmul,
}
ONLY_BY_NAME = {  # jax's own; megablox.py says why they are not the default anywhere
    "megablox": _no_integers("megablox", "grouped_matmul", "tpu"),
    "ragged_dot": _no_integers("megablox", "ragged_matmul"),
}
SWIGLU_IMPLEMENTATIONS = {
    "gpu": late(f"{__name__}.gpu", "grouped_swiglu", "gpu"),
    "tpu": late(f"{__name__}.tpu", "grouped_swiglu", "tpu"),
    "xla": xla.grouped_swiglu,
    "reference": reference.grouped_swiglu,
}
SWIGLU_ONLY_BY_NAME = {
    "megablox": _no_integers("megablox", "grouped_swiglu", "tpu"),
    "ragged_dot": _no_integers("megablox", "ragged_swiglu"),
}


def grouped_matmul(x_MD, w, group_sizes_E, *, transpose_w=False, implementation=None):
    """Each group of rows of x times its expert's matrix: [M, F] in x's dtype, sums in float32.

    Args:
        x_MD: rows sorted by expert: the first group_sizes_E[0] belong to expert 0, the next to expert 1, and so on.
        w: [E, D, F], or [E, F, D] with transpose_w (the order of Hugging Face files: out, in). With transpose_w it may
            be a Scaled, integers with factors: a constant, without a gradient.
        group_sizes_E: int; empty groups are allowed, and rows after the last group give zeros. A sum larger than M, or
            a negative size, is an error that only jax.experimental.checkify can report; without it the result is
            undefined.
        implementation: "tpu", "gpu" (kernels), "xla" (plain XLA, work follows the groups), "reference" (from the
            definition), or None for the first that takes the inputs. Only by name: "megablox" (jax's kernel for TPU),
            "ragged_dot" (jax's operation; on CPU and GPU it costs E times the work).

    Differentiable in x and w; the gradient of an expert without rows is zero.

    Raises:
        ValueError: shapes do not fit, or an unknown implementation.
    """
    _check(x_MD, group_sizes_E, transpose_w, w=w)
    if isinstance(w, Scaled) and not transpose_w:
        raise ValueError("matrices of integers must be [E, F, D], with transpose_w: their groups run over inputs")
    return dispatch(
        "grouped_matmul",
        IMPLEMENTATIONS,
        implementation,
        x_MD,
        w,
        group_sizes_E,
        transpose_w=transpose_w,
        only_by_name=ONLY_BY_NAME,
    )


def grouped_swiglu(x_MD, gate_EFD, up_EFD, group_sizes_E, *, implementation=None):
    """silu(x gate^T) * (x up^T) with each row's own expert: [M, F] in x's dtype. The rest as in grouped_matmul."""
    _check(x_MD, group_sizes_E, True, gate_EFD=gate_EFD, up_EFD=up_EFD)
    if gate_EFD.shape != up_EFD.shape:
        raise ValueError(f"gate_EFD {gate_EFD.shape} and up_EFD {up_EFD.shape} must have one shape")
    return dispatch(
        "grouped_swiglu",
        SWIGLU_IMPLEMENTATIONS,
        implementation,
        x_MD,
        gate_EFD,
        up_EFD,
        group_sizes_E,
        only_by_name=SWIGLU_ONLY_BY_NAME,
    )


def _check(x_MD, group_sizes_E, transpose_w, **weights):
    if x_MD.ndim != 2 or group_sizes_E.ndim != 1:
        raise ValueError(f"x_MD must be [M, D] and group_sizes_E [E], got {x_MD.shape} and {group_sizes_E.shape}")
    for name, w in weights.items():
        width = w.ndim == 3 and w.shape[2 if transpose_w else 1]
        if w.ndim != 3 or w.shape[0] != group_sizes_E.shape[0] or width != x_MD.shape[1]:
            form = "[E, F, D]" if transpose_w else "[E, D, F]"
            raise ValueError(
                f"{name} must be {form} with E = {group_sizes_E.shape[0]} and D = {x_MD.shape[1]}, got {w.shape}"
            )
    checkify.debug_check(
        jnp.all(group_sizes_E >= 0) & (jnp.sum(group_sizes_E) <= x_MD.shape[0]),
        "group_sizes_E must be >= 0 and sum to at most M = {M} rows, got {group_sizes_E}",
        M=jnp.int32(x_MD.shape[0]),
        group_sizes_E=group_sizes_E,
    )
