# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: one function per operation of the model, implementations chosen by name.

A kernel sees the arrays of one device. Where the caller is traced on a mesh (sharding.on), every operation here runs in
a shard_map: rows of the batch, their tokens, heads and experts are sharded as sharding.RULES says; a dimension that an
axis does not divide is not sharded over it. Attention gathers keys and values over the devices that hold other tokens
of the same rows, and communicates nothing else. A cache is never gathered: each device attends over its own slots of a
row, and the results are merged. Tokens are sent to the devices that hold their experts (parallel/expert_exchange.py),
or all tokens are gathered where that moves fewer bytes.

`implementation` is None (the first that supports device and inputs), one name for all operations ("xla"), or names by
operation ("attention=splash,experts=ragged_dot"; None for those left out). "exchange=gather" or "exchange=all_to_all"
is how experts get tokens of other devices.
"""

from qwen2_jax.ops.attention import attention, cached_attention, write_cache
from qwen2_jax.ops.experts import exchange_of, experts
from qwen2_jax.ops.implementations import check_implementation
from qwen2_jax.ops.paged import PAGES, PageLayout, paged_attention, write_pages
from qwen2_jax.ops.per_device import CACHE, FEW_QUERIES
from qwen2_jax.ops.weight_only import weight_only_matmul

__all__ = [
    "CACHE", "FEW_QUERIES", "PAGES", "PageLayout", "attention", "cached_attention", "check_implementation",
    "exchange_of", "experts", "paged_attention", "weight_only_matmul", "write_cache", "write_pages",
]  # fmt: skip
