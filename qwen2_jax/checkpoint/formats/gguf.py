# SPDX-License-Identifier: Apache-2.0
"""GGUF files, llama.cpp's: one file, or parts of one model, with config, tokenizer and chat template inside.

Tensors are stored plain or in blocks (gguf_blocks.py); quantised ones are dequantised in float32, block by block, when
they are read. Names and layouts are those of llama.cpp's converter for qwen2 and qwen2moe; nothing is permuted.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.file_tensors import FileTensors
from qwen2_jax.checkpoint.formats.gguf_blocks import BLOCKS, BlockType
from qwen2_jax.checkpoint.formats.gguf_file import MAGIC, GgufFile, GgufTensor, read_gguf
from qwen2_jax.checkpoint.formats.gguf_metadata import FILES, Metadata
from qwen2_jax.checkpoint.formats.names import Slot, Tree, table
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.small_files import SmallFiles
from qwen2_jax.checkpoint.formats.stored_tensor import DecodedTensor, GroupLayout, Integers, StoredTensor
from qwen2_jax.errors import CheckpointError

PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
CHUNK = 1 << 17  # weights that are dequantised at a time: what they need stays in the processor's cache

# Hugging Face's names and ours for what llama.cpp calls otherwise; {L} is a layer.
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{which}_proj": f"ffn_{which}" for which in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{which}_proj": f"ffn_{which}_shexp" for which in ("gate", "up", "down")},
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def gguf_name(name: str) -> tuple[str, int | None]:
    """(llama.cpp's name of a Hugging Face tensor, the expert's index in it or None)."""
    if name in OUTSIDE:
        return OUTSIDE[name], None
    match = LAYER.fullmatch(name)
    if match is None:
        raise CheckpointError(f"GGUF has no name for {name}")
    layer, module, kind = match.groups()
    if expert := EXPERT.fullmatch(module):
        return f"blk.{layer}.ffn_{expert[2]}_exps.{kind}", int(expert[1])
    return f"blk.{layer}.{IN_LAYER[module]}.{kind}", None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The decoder of one type of block; see Decoder in stored_tensor.py."""

    type: BlockType
    row_multiple: int = 1

    @property
    def kind(self) -> str:
        return self.type.name

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout:
        return self.type.layout

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        with parts["blocks"].mapped() as raw:
            q, scale, offset = self.type.integers(raw[rows].reshape(-1, self.type.nbytes))
        in_rows = [part if part is None else part.reshape(rows.stop - rows.start, -1) for part in (q, scale, offset)]
        return tuple(in_rows)  # type: ignore[return-value]

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        with parts["blocks"].mapped() as raw:
            blocks = raw[rows].reshape(-1, self.type.nbytes)
            out = np.empty((len(blocks), self.type.weights), np.float32)
            step = CHUNK // self.type.weights
            for start in range(0, len(blocks), step):
                out[start : start + step] = self.type.dequantize(blocks[start : start + step])
        return out.reshape(rows.stop - rows.start, -1)


class GgufTensors(FileTensors):
    """The tensors of an opened model, under Hugging Face's names."""

    def __init__(self, path: Path, model_names: Mapping[str, Slot]):
        super().__init__()
        tensors = _tensors(_parts(path))
        errors = CollectedErrors(str(path))
        wanted: dict[str, tuple[int, ...]] = {}
        experts: dict[str, int] = {}
        for name, slot in model_names.items():
            stored, expert = gguf_name(name)
            wanted[stored] = slot.shape
            if expert is not None:
                experts[stored] = max(experts.get(stored, 0), expert + 1)
        wanted = {
            name: (experts[name], *shape) if name in experts else _squeezed(name, shape)
            for name, shape in wanted.items()
        }
        errors.compare({name: tensor.shape for name, tensor in tensors.items()}, wanted)
        errors.raise_any()
        for name, slot in model_names.items():
            stored, expert = gguf_name(name)
            self.infos[name] = _weight(tensors[stored], slot.shape, expert)

    def layout(self) -> None:
        """No safetensors files hold these tensors."""


def _squeezed(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp stores the gate of the shared expert, [1, D], with one dimension."""
    return shape[1:] if name.endswith("ffn_gate_inp_shexp.weight") else shape


def _weight(tensor: GgufTensor, shape: tuple[int, ...], expert: int | None) -> StoredTensor:
    stored = tensor.stored
    if expert is not None:
        start = stored.start + expert * (stored.nbytes // stored.shape[0])
        stored = dataclasses.replace(stored, shape=stored.shape[1:], start=start)
    if tensor.type_id not in BLOCKS:
        return dataclasses.replace(stored, shape=shape)
    decoder = Blocks(BLOCKS[tensor.type_id])
    return DecodedTensor(np.dtype(np.float32), shape, {"blocks": stored}, decoder)


def _parts(path: Path) -> list[GgufFile]:
    """All files of a model. Raises CheckpointError where one is missing, or another than the first was given."""
    first = read_gguf(path)
    count, number = (_small(first, f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
    if count <= 1:
        return [first]
    if number != 0:
        raise CheckpointError(f"{path} is part {number + 1} of {count}; give the first, ...-00001-of-{count:05}.gguf")
    match = PART.fullmatch(path.name)
    if match is None or int(match[2]) != count:
        raise CheckpointError(
            f"{path} is the first of {count} parts and must be called NAME-00001-of-{count:05}.gguf, with the others "
            "beside it"
        )
    parts = [first]
    for n in range(1, count):
        file = path.with_name(f"{match[1]}-{n + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise CheckpointError(f"{path} is the first of {count} parts, and {file.name} is not beside it; fetch it")
        part = read_gguf(file)
        if (_small(part, "split.count", 1), _small(part, "split.no", 0)) != (count, n):
            raise CheckpointError(f"{file} is not part {n + 1} of {count}, as its name says; fetch it again")
        parts.append(part)
    return parts


def _small(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= 99_999:
        raise CheckpointError(f"{file.path}: {key} is {value!r:.60}; it must be a number up to 99999")
    return value


def _tensors(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path} holds {twice[0]}, which another part holds too")
        tensors |= part.tensors
    return tensors


class GgufFiles:
    """The small files that a GGUF file stands for; see SmallFiles in small_files.py."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return list(FILES)

    def read_bytes(self, name: str, limit: int | None = None) -> bytes | None:
        if name not in FILES:
            return None
        parts = _parts(self.path)
        tensors = _tensors(parts)
        types = {tensor.type_name for tensor in tensors.values()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        metadata = Metadata(str(self.path), parts[0].metadata, shapes, "float32" if types == {"F32"} else "bfloat16")
        text = metadata.file(name)
        return None if text is None else text.encode()


def _looks_like(path: Any, names: Collection[str]) -> bool:
    if not isinstance(path, Path) or not path.is_file():
        return False
    if path.name.endswith(".gguf"):
        return True
    with open(path, "rb") as f:
        return f.read(4) == MAGIC


def in_folder(folder: Path, names: Collection[str]) -> Path | None:
    """The one GGUF model of a folder with these files; None where there is none.

    Raises CheckpointError where there are several: they are other quantisations, most likely, and one has to be chosen.
    """
    files = sorted(name for name in names if name.endswith(".gguf"))
    models = [name for name in files if not LATER_PART.search(name)]
    if len(models) > 1:
        raise CheckpointError(f"{folder} holds several GGUF models; give one of them: {', '.join(models[:20])}")
    return folder / (models or files)[0] if files else None


def _open(path: Path, files: SmallFiles, specs: Tree, *, tied: bool) -> GgufTensors:
    return GgufTensors(path, table(specs))


FORMAT = Format("gguf", "GGUF", _looks_like, _open, GgufFiles)
