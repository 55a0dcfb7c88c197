# SPDX-License-Identifier: Apache-2.0
"""Puts batches on the devices: which rows each process reads, and the order of a row's tokens on a mesh."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.parallel import sharding

# B batch  T tokens of a row
NAMES = ("batch", "length")


class Placing:
    """Puts batches on a mesh, or on the only device where it is None.

    host: (index, count), the part of each batch that this process reads. Processes whose devices hold the same rows, as
    where a model's heads are split over several hosts, read the same part.
    """

    def __init__(self, mesh: jax.sharding.Mesh | None):
        self.mesh, self.host = mesh, (0, 1)
        self._row_parts = self._token_parts = 1
        self._mine: tuple[int, ...] = (0,)
        if mesh is None:
            return
        self._row_parts, self._token_parts = (sharding.parts(sharding.axes_of(name, mesh), mesh) for name in NAMES)
        shape = (self._row_parts, self._token_parts)
        held: dict[int, set[int]] = {}  # process -> parts of the rows
        for device, index in sharding.sharding(NAMES, shape, mesh).devices_indices_map(shape).items():
            held.setdefault(cast(Any, device).process_index, set()).add(cast(Any, index)[0].start or 0)
        shares = sorted({tuple(sorted(found)) for found in held.values()})
        if sorted(part for share in shares for part in share) != list(range(self._row_parts)):
            raise ValueError(f"processes hold rows that overlap in part: {shares} on {mesh}")
        self._mine = tuple(sorted(held[jax.process_index()]))
        self.host = shares.index(self._mine), len(shares)

    def __call__(self, batch: Batch) -> Batch:
        """The batch of which `batch` has this process's rows, as global arrays.

        Raises UserError where the mesh does not divide its rows or their length.
        """
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        B, T = batch.tokens_BT.shape
        shape = (B * self.host[1], T)
        place, order_T = sharding.sharding(NAMES, shape, self.mesh), balanced(T, self._token_parts)
        part = shape[0] // self._row_parts

        def shard(x_BT: np.ndarray, index) -> np.ndarray:
            rows, tokens = index
            at = self._mine.index((rows.start or 0) // part) * part
            return x_BT[at : at + part, order_T[tokens]]

        return jax.tree.map(
            lambda x: jax.make_array_from_callback(shape, place, lambda index: shard(np.asarray(x), index)), batch
        )

    def back(self, x_BT: jax.Array) -> np.ndarray:
        """Values of a batch that this has placed, [B, T], on the host and in the order of the tokens. One process."""
        found_BT = np.asarray(x_BT)
        if self._token_parts == 1:
            return found_BT
        return found_BT[:, np.argsort(balanced(found_BT.shape[1], self._token_parts))]


def balanced(length: int, parts: int) -> np.ndarray:
    """The order of a row's tokens, int [length], in which `parts` equal parts have equal work under a causal mask.

    A row is cut into 2 * parts pieces, and a part is a piece from the front and its counterpart from the back (Llama 3,
    arXiv:2407.21783, sec. 3.3.2). Masks are positions, so no result depends on the order. Tokens stay as they are where
    the pieces would not be equal.
    """
    order_T = np.arange(length)
    if parts == 1 or length % (2 * parts):
        return order_T
    pieces = order_T.reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([pieces[i], pieces[2 * parts - 1 - i]]) for i in range(parts)])
