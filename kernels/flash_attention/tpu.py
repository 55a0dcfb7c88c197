# SPDX-License-Identifier: Apache-2.0
"""Flash attention on TPUs: the kernels of Dual Chunk Attention with one rotation of the query."""

from ..dual_chunk_attention.tpu import attend as flash_attention

__all__ = ["flash_attention"]
