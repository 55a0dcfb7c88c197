# SPDX-License-Identifier: Apache-2.0
"""FLOPs and memory traffic of one device of a mesh, by formula; roofline.py converts them to seconds.

Work that a mesh cannot divide is done on every device that shares it: dense layers on each part of the expert axis
where too few rows are left for it. Heads that do not divide over tensor are padded (head_padding.py); those count too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model import flops, head_padding
from qwen2_jax.parallel import sharding
from qwen2_jax.parallel.chips import Chip
from qwen2_jax.plan.roofline import attention_rate, matmul_rate

# Passes of the attention kernels over the visible pairs, in units of a forward pass: the backward kernels compute the
# scores again, five products instead of two.
BACKWARD = 2.5


class Parts(NamedTuple):
    """Number of parts into which a mesh divides each kind of work; the other devices repeat the same work."""

    rows: int
    dense: int
    experts: int
    attention: float


class Work(NamedTuple):
    """Seconds of arithmetic and of memory traffic on one device."""

    compute: float
    memory: float


def parts(config: ModelConfig, mesh: Mesh, rows: int, length: int = 1) -> Parts:
    """rows, length: of the batch, which is sharded over its axes as far as they divide it."""
    by_rows = _product(mesh, sharding.dividing("batch", rows, mesh))
    tokens = by_rows * _product(mesh, sharding.dividing("length", length, mesh))
    tensor = _product(mesh, sharding.axes_of("mlp", mesh))
    wider = head_padding.spread(config, mesh)  # padding heads are work too
    real = 1.0 if wider is None else config.num_attention_heads / wider.config.num_attention_heads
    # Devices that hold different experts divide the experts' work, whether or not their rows of the batch differ.
    holders = sharding.axes_of("experts", mesh) if config.num_experts else ()
    experts = _product(mesh, [axis for axis in holders if axis not in sharding.dividing("batch", rows, mesh)])
    return Parts(by_rows, tokens * tensor, tokens * tensor * experts, tokens * tensor * real)


def cached(cut: Parts, mesh: Mesh, *, slots: int, tokens: int = 1) -> Parts:
    """Parts of a step over a cache of `slots` slots, which are sharded too, as a prefill's tokens may be.

    A prompt fills its slots from the first: while it does, the fullest share has up to twice the mean.
    """
    shares, pieces = (
        _product(mesh, sharding.dividing(*sizes, mesh)) for sizes in (("slots", slots), ("length", tokens))
    )
    uneven = 2 - 1 / shares if tokens > 1 else 1.0
    return Parts(cut.rows, cut.dense * pieces, cut.experts * pieces, cut.attention * shares / uneven)


def train_work(
    config: ModelConfig, chip: Chip, cut: Parts, *,
    lengths: Sequence[int], remat: str | None, frozen: bool, accumulate: int, state_bytes: int, weight_bytes: int,
    kept_bytes: float,
) -> Work:  # fmt: skip
    """One training step. lengths: of the documents in its batch.

    state_bytes: of float32 weights and what the optimizer keeps for them, on one device, read and written once.
    weight_bytes: of the weights' copy that one device multiplies with, gathered: written and read in each of three
    passes of every micro-batch. kept_bytes: of all activations of a step on one device, written once and read twice.
    """
    tokens = sum(lengths)
    matrices, expert = flops.matrix_parameters(config), flops.expert_parameters(config)
    head = flops.head_parameters(config)
    passes = 4 if frozen else 6
    again = 2 if remat == "full" else 0
    dense = tokens * (passes * (matrices - expert) + again * (matrices - expert - head))
    # A grouped product is a kernel, whose result "dots" does not keep.
    experts = tokens * expert * (passes + (2 if remat is not None else 0))
    attention = flops.attention_flops(config, lengths) * (1 + BACKWARD + (remat is not None))
    longest = max(lengths)
    compute = (dense / cut.dense + experts / cut.experts) / matmul_rate(chip)
    compute += attention / cut.attention / attention_rate(chip, config.head_dim, longest)
    moved = 2 * state_bytes + accumulate * 3 * 2 * weight_bytes + 3 * kept_bytes
    return Work(compute, moved / (chip.hbm_gb_s * 1e9))


def prefill_work(
    config: ModelConfig,
    chip: Chip,
    cut: Parts,
    *,
    rows: int,
    length: int,
    chunk: int,
    weight_bytes: int,
    cache_bytes: int,
) -> Work:
    """Prompts of `length` tokens in each of `rows`, in chunks. weight_bytes, cache_bytes: on a device, the cache full.

    A chunk reads the weights, and the cache up to where it stands.
    """
    matrices, expert = flops.matrix_parameters(config), flops.expert_parameters(config)
    head = flops.head_parameters(config)  # a prefill computes no logits
    tokens = rows * length
    compute = 2 * tokens * ((matrices - expert - head) / cut.dense + expert / cut.experts) / matmul_rate(chip)
    attention = flops.attention_flops(config, [length] * rows) / cut.attention
    compute += attention / attention_rate(chip, config.head_dim, length)
    chunks = math.ceil(length / chunk)
    moved = chunks * weight_bytes + cache_bytes * (chunks + 1) / 2
    return Work(compute, moved / (chip.hbm_gb_s * 1e9))


def decode_work(
    config: ModelConfig, chip: Chip, cut: Parts, *, rows: int, length: int, weight_bytes: int, expert_bytes: int,
    cache_bytes: int,
) -> Work:  # fmt: skip
    """One token for each of `rows`, at `length` tokens. weight_bytes: without the routed experts' expert_bytes.

    Of the experts those are read that some row chose: 1 - (1 - k/E)^rows of them, where choices are even.
    """
    matrices, expert = flops.matrix_parameters(config), flops.expert_parameters(config)
    compute = 2 * rows * ((matrices - expert) / cut.dense + expert / cut.experts)
    compute += (
        4 * rows * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers / cut.attention
    )
    met = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows if config.num_experts else 0.0
    moved = weight_bytes + met * expert_bytes + cache_bytes
    return Work(compute / matmul_rate(chip), moved / (chip.hbm_gb_s * 1e9))


def _product(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
