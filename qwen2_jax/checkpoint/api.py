# SPDX-License-Identifier: Apache-2.0
"""Opening, saving and converting whole checkpoints: weights, config, tokenizer files, generation settings, manifest."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen2_jax.checkpoint.formats import gguf_write, names
from qwen2_jax.checkpoint.formats.in_memory import TreeTensors, recast
from qwen2_jax.checkpoint.formats.names import Tree
from qwen2_jax.checkpoint.formats.protocol import ArrayTensors, Progress, Reader
from qwen2_jax.checkpoint.formats.safetensors_layout import SHARD_BYTES, Layout, new_layout
from qwen2_jax.checkpoint.manifest import Report, compare
from qwen2_jax.checkpoint.sources import Source, locate, read_config
from qwen2_jax.checkpoint.transfer import load, multihost
from qwen2_jax.checkpoint.transfer.write import WRITERS, Writing, small_files, write_hf, write_orbax
from qwen2_jax.config.model_config import DTYPES, ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.model.decoder import declare
from qwen2_jax.parallel.sharding import RULES
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.weights.forms import FORM_DTYPE, form_of, nbytes
from qwen2_jax.weights.params import leaves


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checked checkpoint. layout: of its safetensors files, as they are or as they were before it was converted."""

    source: Source
    config: ModelConfig
    specs: Tree
    tensors: Reader
    layout: Layout | None


def open_checkpoint(name: str | Path | Source, config: ModelConfig | None = None) -> Opened:
    """Opens a checkpoint and compares its names, shapes and dtypes with its config; reads no weights.

    Raises CheckpointError that lists everything missing, unexpected, misshapen, truncated or of an unsupported dtype.
    """
    source = locate(name)
    config = config or read_config(source)
    specs = declare(config)[1]
    tensors = source.format.open(source.path, source.files, specs, tied=config.tie_word_embeddings)
    return Opened(source, config, specs, tensors, tensors.layout())


def quantised_types(opened: Opened) -> tuple[str, ...]:
    """How a checkpoint stores its weights where that is not a plain dtype, such as ("Q4_K", "Q6_K"), sorted."""
    return tuple(sorted({info.kind for info in opened.tensors.infos.values() if info.kind != info.dtype.name}))


def load_params(
    source: str | Path | Source,
    config: ModelConfig | None = None,
    *,
    dtype=None,
    unroll: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping = RULES,
    only_layers: bool = False,
    progress: Progress | None = None,
) -> Tree:
    """The parameters of a checkpoint as a nested dict of arrays, created sharded: each device gets only its own bytes.

    dtype: of all parameters, e.g. "bfloat16"; default: the config's. Or the form of the weight matrices, "int8" or
    "int4" (weights/forms.py): each is rounded as soon as it is read, and everything else is bfloat16. only_layers:
    embedding and LM head are not rounded. unroll: one array per layer. mesh: devices to spread over by `rules` (of
    parallel/sharding.py: RULES to train, SERVING to generate); default: the first device.
    progress(bytes done, bytes in all).
    """
    opened = open_checkpoint(source, config)
    form = form_of(str(dtype), only_layers=only_layers)
    wanted = jnp.dtype(FORM_DTYPE if form else dtype or opened.config.dtype)
    specs = names.unrolled(opened.specs) if unroll else opened.specs
    specs = names.nested({path: dataclasses.replace(spec, dtype=wanted) for path, spec in leaves(specs)})
    return opened.tensors.read_params(specs, load.param_shardings(mesh, rules), progress=progress, form=form)


def model_bytes(source: str | Path | Source | ModelConfig, dtype=None) -> int:
    """Bytes the parameters will take on the devices, known before any weight is read. dtype: default the config's."""
    config = source if isinstance(source, ModelConfig) else read_config(locate(source))
    return nbytes(declare(config)[1], str(dtype or config.dtype))


def save_hf(
    path: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    dtype: str | None = None,
    tokenizer_files_from: str | Path | Source | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a Hugging Face folder that transformers loads, one tensor at a time. Returns its path.

    params: stacked or unrolled, on any devices. dtype: to write them in, one layer cast at a time; default: their own.
    tokenizer_files_from: a checkpoint whose tokenizer, generation settings and other small files are copied.
    max_shard_bytes: size above which weights go to a new file. replace: an existing folder is replaced
    when the new one is complete. Where several processes run, all of them call this with one path on a shared disk;
    each writes its share of the tensors, of which it holds one layer's at a time.
    """
    tree = TreeTensors(config, params)
    tensors = tree if dtype is None else recast(tree, dtype)
    with multihost.together(f"reading {tokenizer_files_from}"):
        files = small_files(config, tensors.infos, tokenizer_files_from)
    layout = new_layout(tensors.infos, max_shard_bytes)
    return write_hf(path, Writing(tensors, tree.table, progress), layout, files, replace=replace)


def save_orbax(
    path: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    tokenizer_files_from: str | Path | Source | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes an Orbax folder (see orbax_folder.py) with config, tokenizer files and manifest. Returns its path.

    Where several processes run, all of them call this with one path on a shared disk; each writes its devices' parts.
    """
    tensors = TreeTensors(config, params)
    with multihost.together(f"reading {tokenizer_files_from}"):
        files = small_files(config, tensors.infos, tokenizer_files_from)
    return write_orbax(path, Writing(tensors, tensors.table, progress), tensors.specs, None, files)


def convert(
    src: str | Path | Source,
    dst: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Copies a checkpoint into another format, or the same one in another dtype, holding one array at a time.

    to: "hf" or "orbax", which are folders, or "gguf", one file (gguf_write.py), of which dtype may also be "q8_0".

    Without dtype every tensor keeps its own, and a folder that was converted from Hugging Face format is written back
    with the very same files, unless max_shard_bytes asks for other ones (default 5 GB where they are not known). A
    quantised checkpoint is dequantised, in float32 and then to dtype, by default the one that its config names.
    Where several processes run, all of them call this with one `dst` on a shared disk; each reads and writes its share.
    Raises CheckpointError for a source that cannot be used and a `dst` that exists.
    """
    if to not in (*WRITERS, "gguf"):
        choices = ", ".join((*WRITERS, "gguf"))
        raise CheckpointError(f"to is {to!r}; choose from {choices}; write_gptq writes GPTQ, which needs a text")
    dtypes = gguf_write.KINDS if to == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise CheckpointError(f"dtype is {dtype!r}; choose from {', '.join(dtypes)}")
    if to == "gguf":
        return _convert_to_gguf(src, dst, dtype, progress)
    with multihost.together(f"opening {src}"):
        source = locate(src)
        if isinstance(source.path, Path) and Path(dst).expanduser().resolve() == source.path.resolve():
            raise CheckpointError(f"{dst} is the source itself; choose a new folder")
        opened = open_checkpoint(source)
        tensors: ArrayTensors = opened.tensors
        layout, config = opened.layout, opened.config
        if dtype is None and quantised_types(opened):
            dtype = config.dtype
        if dtype is not None:
            tensors, layout, config = recast(tensors, dtype), None, dataclasses.replace(config, dtype=dtype)
        if layout is not None and not layout.serves(tensors.infos):
            layout = None  # the weights were changed since
        files = small_files(config, tensors.infos, source, keep_dtype=dtype is None)
    writing = Writing(tensors, names.table(opened.specs), progress)
    return WRITERS[to](dst, writing, opened.specs, layout, files, max_shard_bytes)


def _convert_to_gguf(src: str | Path | Source, dst: str | Path, dtype: str | None, progress: Progress | None) -> Path:
    if jax.process_count() > 1:
        raise CheckpointError("GGUF files are written by one process; run this convert in one")
    opened = open_checkpoint(src)
    with opened.source.folder_of_small_files() as folder:
        tokenizer = Tokenizer.from_folder(folder)
    table, kind = names.table(opened.specs), dtype or opened.config.dtype
    return gguf_write.write_gguf(dst, opened.config, opened.tensors, table, tokenizer, kind, progress)


def verify(name: str | Path | Source, *, progress: Progress | None = None) -> Report:
    """Reads a whole checkpoint and compares every tensor and file with its manifest; checks the structure anyway."""
    opened = open_checkpoint(name)
    source = opened.source
    return compare(source.path, source.files, opened.tensors, opened.layout, progress=progress)
