# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: one function per operation of the model, implementations chosen by name.

A kernel sees the arrays of one device. Where the caller is traced on a mesh (sharding.on), every operation here runs in
a shard_map: rows of the batch, their tokens, heads and experts are split as sharding.RULES says, and what a dimension's
size does not allow is not split. Attention gathers keys and values over the devices that have other tokens of the same
rows, and needs nothing else. A cache is never gathered: devices that have other slots of the same rows attend over
their own, and the results are merged. Experts get their tokens from the devices that have them: parallel/
expert_exchange.py sends each token to its experts, or all tokens are gathered where that moves fewer bytes.

`implementation` is None (the best that serves the device), one name for all operations ("xla"), or names by operation
("attention=splash,experts=ragged_dot"; those left out take the best that serves). "exchange=gather" or
"exchange=all_to_all" is how experts get tokens of other devices.
"""

from qwen2_jax.ops.attention import attention, cached_attention, write_cache
from qwen2_jax.ops.experts import exchange_of, experts
from qwen2_jax.ops.implementations import check_implementation
from qwen2_jax.ops.per_device import CACHE, FEW_QUERIES

__all__ = [
    "CACHE", "FEW_QUERIES", "attention", "cached_attention", "check_implementation", "exchange_of", "experts",
    "write_cache",
]  # fmt: skip
