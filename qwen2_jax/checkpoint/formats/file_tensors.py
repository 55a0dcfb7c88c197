# SPDX-License-Identifier: Apache-2.0
"""The part of a Reader that all formats share whose tensors can be read one by one, in ranges of rows."""

from collections.abc import Container, Iterator, Sequence

import jax
import numpy as np

from qwen2_jax.checkpoint.formats.names import Leaf, Tree
from qwen2_jax.checkpoint.formats.protocol import Progress, Sharding
from qwen2_jax.checkpoint.formats.stored_tensor import StoredTensor
from qwen2_jax.checkpoint.transfer import load
from qwen2_jax.weights.forms import Form
from qwen2_jax.weights.params import ParamSpec


class FileTensors:
    """Tensors in files. infos: filled by the format. bytes_read: file bytes asked for so far."""

    def __init__(self) -> None:
        self.infos: dict[str, StoredTensor] = {}
        self.bytes_read = 0

    def stream(self, names: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See Tensors in protocol.py."""
        for name in names:
            if mine is None or name in mine:
                self.bytes_read += self.infos[name].stored_bytes
                with self.infos[name].mapped() as array:
                    yield name, array

    def read_array(self, leaf: Leaf, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
        """See ArrayTensors in protocol.py."""
        return load.read_array(self, spec, where)

    def read_params(
        self, specs: Tree, sharding: Sharding, *, progress: Progress | None = None, form: Form | None = None
    ) -> Tree:
        """See Reader in protocol.py."""
        return load.read_params(self, specs, sharding, progress=progress, form=form)
