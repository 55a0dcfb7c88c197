# SPDX-License-Identifier: Apache-2.0
"""The checks and timings, ordered by their worth per second. Imports nothing heavy."""

from typing import NamedTuple


class Piece(NamedTuple):
    """One process that runs several cases.

    cases: "module.function" of this folder; function(setting) returns {case: function without arguments}.
    seconds: expected on one H200, the start of the process included. case_seconds: limit of one case.
    """

    name: str
    what: str
    cases: str
    seconds: int
    on: tuple[str, ...] = ("gpu", "tpu")
    needs: tuple[str, ...] = ()  # packages, besides those that the project needs everywhere
    case_seconds: int = 60


class Setting(NamedTuple):
    """How a piece runs. platform: "gpu", "tpu", or "cpu" where nothing else is (with small only).

    small: tiny shapes; on a CPU the kernels run in Pallas's interpreters.
    """

    platform: str
    small: bool


GPU, TPU = ("gpu",), ("tpu",)
PIECES = (
    Piece("peaks", "a copy in memory and a product of two matrices: the limits of this chip", "speed.peaks", 20),
    Piece("flash_attention gpu", "results and gradients", "checks.flash_gpu", 45, GPU),
    Piece("flash_attention tpu", "results and gradients", "checks.flash_tpu", 45, TPU),
    Piece("grouped_matmul gpu", "results and gradients, SwiGLU too", "checks.grouped_gpu", 35, GPU),
    Piece("grouped_matmul tpu", "results and gradients, SwiGLU too", "checks.grouped_tpu", 35, TPU),
    Piece("decode_attention gpu", "dense, paged, int8, chunked, several queries", "checks.decode_gpu", 35, GPU),
    Piece("decode_attention tpu", "dense, paged, int8, chunked, several queries", "checks.decode_tpu", 35, TPU),
    Piece("weight_only_matmul gpu", "int4, int8; experts of them; gradient of x", "checks.weight_only_gpu", 35, GPU),
    Piece("weight_only_matmul tpu", "int4, int8; experts of them; gradient of x", "checks.weight_only_tpu", 35, TPU),
    Piece("dual_chunk_attention gpu", "results and gradients", "checks.dual_chunk_gpu", 45, GPU),
    Piece("dual_chunk_attention tpu", "results and gradients", "checks.dual_chunk_tpu", 45, TPU),
    Piece("speed of flash_attention", "prefill and training, beside cuDNN or splash", "speed.flash", 60),
    Piece("speed of grouped_matmul", "the experts of 57B-A14B, beside one dense product", "speed.grouped", 45),
    Piece("speed of decode_attention", "1, 8, 64 rows at 4k and 32k", "speed.decode", 50),
    Piece("speed of weight_only_matmul", "int4, int8, 1 to 4,096 rows, and 57B's experts", "speed.weight_only", 70),
    Piece("model on the kernels", "logits, gradients, prefill, a decoding step", "models.on_kernels", 60),
    Piece("speed of 7B", "random weights: prefill, decoding, tokens/s", "models.speed_7b", 150, case_seconds=120),
    Piece("speed of dual_chunk_attention", "131k, beside plain causal", "speed.dual_chunk", 40),
    Piece("speed of a training step", "four layers of 7B's width: MFU, memory", "training.speed_training", 60),
    Piece("recorded logits", "transformers' logits and losses, float32", "models.goldens", 60),
    Piece("demo", "greedy tokens and int8 logits, against the CPU's", "models.demo", 45),
    Piece("training step", "loss, gradients, weights, against the CPU's", "training.training", 40),
    Piece("speed beside torch", "scaled_dot_product_attention, matmul", "rivals.torch_speed", 40, GPU, ("torch",)),
    Piece("portable kernels", "what every other chip gets: xla", "checks.portable", 60),
    Piece("speed of 0.5B", "random weights: prefill, decoding, tokens/s", "models.speed_half_b", 90, case_seconds=120),
    Piece("speed of long prompts", "DCA beside plain causal at 32k, 0.5B", "models.speed_long", 60, case_seconds=120),
    Piece("kernels of jax and NVIDIA", "those taken by name only: right too?", "checks.by_name", 40),
    Piece("speed of other sizes", "shapes of 0.5B and 72B", "speed.other_sizes", 60),
)
FAULTS = (  # a test of the command itself: each must cost its own line and nothing else
    Piece("fault: wrong", "a kernel that doubles its result", "faults.wrong", 5),
    Piece("fault: hangs", "a case that never ends, then one that is right", "faults.hangs", 5, case_seconds=4),
    Piece("fault: out of memory", "more than there is, then a case that is right", "faults.out_of_memory", 5),
    Piece("fault: crashes", "a process that ends by itself, then a case that is right", "faults.crashes", 5),
)
BY_NAME = {piece.name: piece for piece in PIECES + FAULTS}
