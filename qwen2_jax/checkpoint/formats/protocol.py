# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint format offers; the rest of checkpoint/ asks a format by these names and never which one it is.

A new format is one file beside this one that defines a Format, and its entry in table.py:

    looks_like    whether a folder or a file is in this format, from names and a few bytes
    files         config.json, tokenizer and other small files, also where they are inside the weight file
    open          checks names, shapes and dtypes against the model, reads no weights; returns a Reader

A Reader whose tensors can be read one by one derives from FileTensors (file_tensors.py) and only fills `infos` with
StoredTensors (stored_tensor.py): where each weight of the model is, from which tensors, by which decoder. Row ranges,
shards, several hosts, progress, conversion, `verify` and `inspect` follow from that.
"""

import dataclasses
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from qwen2_jax.checkpoint.formats.names import Leaf, Tree
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.small_files import FolderFiles, SmallFiles
from qwen2_jax.checkpoint.formats.stored_tensor import StoredTensor, TensorInfo
from qwen2_jax.weights.forms import Form
from qwen2_jax.weights.params import ParamSpec

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)
Sharding = Callable[[ParamSpec], jax.sharding.Sharding]  # where a parameter is wanted


class Tensors(Protocol):
    """A model's tensors by Hugging Face name: of a checkpoint, of parameters in memory, of a merge."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """dtype and shape by name."""

    def stream(self, names: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) for each of `names`, in any order; an array is valid until the next one is asked for.

        mine: only these are yielded. Where several processes run, all of them ask for the same names in the same order
        and go through to the end, each with its own `mine`: they may have to bring parts of the others' tensors.
        """


class ArrayTensors(Tensors, Protocol):
    """Tensors that can also be had as device arrays, with parts on several hosts."""

    def read_array(self, leaf: Leaf, spec: ParamSpec, where: jax.sharding.Sharding) -> jax.Array:
        """One array of an Orbax folder. spec: its declaration in the unrolled model, with the dtype that is wanted.

        Parameters in memory come in their own dtype, and stay where they are if that is on several hosts.
        """


class RowTensors(Protocol):
    """Tensors of which a host can read any rows. bytes_read: file bytes asked for so far."""

    bytes_read: int

    @property
    def infos(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the model by name."""


class Reader(ArrayTensors, Protocol):
    """An opened checkpoint whose names, shapes and dtypes are those of its config."""

    def read_params(
        self, specs: Tree, sharding: Sharding, *, progress: Progress | None = None, form: Form | None = None
    ) -> Tree:
        """The parameters declared by `specs`, in their dtypes and shardings. progress counts the checkpoint's bytes.

        form: of the weight matrices, where they are not kept as arrays.
        """

    def layout(self) -> Layout | None:
        """The safetensors files that hold or held these tensors, to write them again byte for byte, if known."""


class Opener(Protocol):
    """Opens the checkpoint at `path`, raising one CheckpointError with everything that is wrong."""

    def __call__(self, path: Any, files: SmallFiles, specs: Tree, *, tied: bool) -> Reader:
        """specs: the declarations of the model in `files`. tied: whether its head is the embedding."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of checkpoints.

    name: as in Source.kind and `--to`. title: for people. looks_like(path, names): names are those of the files in the
    folder, none where path is a file. whole_arrays: reading a tensor brings the whole array of its layer (all experts)
    into memory, and several arrays together.
    """

    name: str
    title: str
    looks_like: Callable[[Any, Collection[str]], bool]
    open: Opener
    files: Callable[[Any], SmallFiles] = FolderFiles
    whole_arrays: bool = False
