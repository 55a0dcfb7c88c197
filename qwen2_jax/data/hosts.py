# SPDX-License-Identifier: Apache-2.0
"""Several hosts must read the same tokens: each takes its part of what it believes to be the batch of all."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen2_jax.errors import UserError


def check_equal(paths: Sequence[str], digests: Sequence[str]) -> None:
    """Raises UserError, on every host, naming the sources whose digests (hexadecimal, of equal length) differ.

    All hosts must call this together.
    """
    if jax.process_count() == 1:
        return
    mine = np.array([list(bytes.fromhex(digest)) for digest in digests], np.uint8)
    found = np.asarray(multihost_utils.process_allgather(mine))  # [hosts, sources, bytes]
    told = []
    for number, path in enumerate(paths):
        (others,) = np.nonzero((found[:, number] != found[0, number]).any(-1))
        if len(others):
            told.append(f"{path} (hosts {', '.join(map(str, others[:8]))}{', ...' * (len(others) > 8)})")
    if told:
        raise UserError(
            f"hosts have other data than host 0: {'; '.join(told)}; give all hosts the same files, tokenizer and "
            "targets, or a cache on a disk that they share"
        )
