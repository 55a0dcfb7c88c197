# SPDX-License-Identifier: Apache-2.0
"""Parameters in memory, on any devices of any hosts, as the tensors of a Hugging Face folder."""

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.casting import narrowed
from qwen2_jax.checkpoint.formats.names import Leaf, Tree
from qwen2_jax.checkpoint.formats.protocol import ArrayTensors
from qwen2_jax.checkpoint.formats.safetensors import CODES
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.transfer.gather import collect, layer
from qwen2_jax.config.model_config import DTYPES, ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.model.decoder import declare
from qwen2_jax.weights.params import ParamSpec, leaves


class TreeTensors:
    """Parameters in memory, stacked or unrolled and on any devices, as the tensors of a Hugging Face folder."""

    def __init__(self, config: ModelConfig, params: Tree):
        self.params = params
        self.specs = _specs_like(config, params)
        self.table = names.table(self.specs)
        shapes = {name: slot.shape for name, slot in self.table.items()}
        self.infos = {
            n: TensorInfo(np.dtype(names.get(params, self.table[n].path).dtype), shapes[n]) for n in self.table
        }
        for name, info in self.infos.items():
            if info.dtype not in CODES:
                raise CheckpointError(
                    f"{name} is {info.dtype}; a checkpoint holds {', '.join(DTYPES)}: cast the parameters first"
                )

    def stream(self, wanted: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See Tensors in protocol.py.

        Arrays with parts on several hosts are collected in groups of as many as there are processes, so that each
        process has one of the group to write and all of them write at the same time.
        """
        at: tuple | None = None
        held: list[list[tuple[str, np.ndarray]]] = []  # per layer of a parameter: experts of one layer come together
        turn = 0
        for name in wanted:
            slot = self.table[name]
            if at != (slot.path, slot.repeat):
                if turn % jax.process_count() == 0:
                    yield from _emptied(held)
                turn += 1
                at = (slot.path, slot.repeat)
                array = collect(layer(names.get(self.params, slot.path), slot.repeat), mine is None or name in mine)
                held.append([])
            if array is not None:
                held[-1].append((name, (array if slot.expert is None else array[slot.expert]).reshape(slot.shape)))
        del array
        yield from _emptied(held)

    def read_array(self, leaf: Leaf, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
        """See ArrayTensors in protocol.py."""
        slot = self.table[leaf.names[0]]
        array = layer(names.get(self.params, slot.path), slot.repeat, keepdims=True)
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array
        values = np.asarray(array)
        return jax.make_array_from_callback(leaf.shape, where, lambda index: values[index])


def _emptied(held: list[list[tuple[str, np.ndarray]]]) -> Iterator[tuple[str, np.ndarray]]:
    """The items of the lists; a list is freed when its last item was taken."""
    while held:
        yield from held.pop(0)


def _specs_like(config: ModelConfig, params: Tree) -> Tree:
    """The declarations that these parameters follow: stacked or unrolled."""
    stacked = declare(config)[1]
    have = {path: tuple(value.shape) for path, value in leaves(params)}
    candidates = (stacked, names.unrolled(stacked))
    for specs in candidates:
        if have == {path: spec.shape for path, spec in leaves(specs)}:
            return specs
    want = {path: spec.shape for path, spec in leaves(candidates[0])}
    wrong = sorted(
        ".".join(map(str, path)) for path in have.keys() ^ want.keys() or {p for p in want if have[p] != want[p]}
    )
    raise CheckpointError(
        f"the parameters do not fit the config: {', '.join(wrong[:10])}" + (" ..." if len(wrong) > 10 else "")
    )


@dataclasses.dataclass(frozen=True)
class Recast:
    """Tensors in another dtype. Raises CheckpointError for one with a number that the dtype cannot hold."""

    tensors: ArrayTensors
    infos: Mapping[str, TensorInfo]

    def stream(self, wanted: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in self.tensors.stream(wanted, mine):
            yield name, narrowed(name, array, self.infos[name].dtype)

    def read_array(self, leaf: Leaf, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
        return self.tensors.read_array(leaf, spec, where)


def recast(tensors: ArrayTensors, dtype: str) -> Recast:
    return Recast(tensors, {name: TensorInfo(jnp.dtype(dtype), info.shape) for name, info in tensors.infos.items()})
