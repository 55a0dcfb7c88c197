# SPDX-License-Identifier: Apache-2.0
"""Block sizes of weight_only_matmul by (generation, shape class); target.block_sizes reads the table.

Chosen by count, not measured. TPU, "few" rows: `step_bytes` are those of integers that a step reads, at most. A step
takes about 0.35 us beside its copies, in which a v6e reads 0.6 MB; a product has at least eight steps where it is long
enough, as the first copy of all is waited for. "Many" rows: at most `rows` x `outputs` of the result at a time. An
integer is widened once for all rows of a block, and a number of x is read once for all outputs, 2 * outputs FLOPs for
two bytes: a v6e can do 560 for each byte.

Hopper: the inputs are cut in parts until there are `programs`, two for each multiprocessor, of `steps` stages at least.
A program has up to `stages` on their way; two share a multiprocessor where each then has `least_stages`.
"""

BLOCKS: dict[tuple[str, str], dict[str, int]] = {
    ("*", "tpu, few"): {"step_bytes": 2**21},
    ("*", "tpu, many"): {"rows": 1024, "outputs": 2048},
    ("hopper", "few"): {"programs": 264, "steps": 4, "stages": 8, "least_stages": 3},
}
