# SPDX-License-Identifier: Apache-2.0
"""How tensors are spread over safetensors files: recorded, to write the very same files again, or made anew."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.checkpoint.formats.safetensors import ALL_DTYPES, MAX_HEADER_BYTES, header_entries, header_text
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.files.path_inside import path_inside
from qwen2_jax.validate import short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
RULE = f"only {SUFFIX} files of the new folder are written"
SHARD_BYTES = 5 * 10**9
# A buffer that older transformers saved; it is computed, not trained.
BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
MAX_BUFFER_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors are spread over files, kept so that the same files can be written again.

    headers: header text by file name. index: text of the index, None for a single file. aliases: names in the files ->
    the model's name of that tensor, where they differ (a tied head that is stored all the same; names without the
    `model.` in front). extras: bytes of harmless tensors that are no parameter.
    """

    headers: Mapping[str, str]
    index: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"extras": {name: data.hex() for name, data in self.extras.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Layout":
        """The layout in the parsed file `where`, which may come from a stranger: files are created from what it says.

        Raises CheckpointError where it could not have been written by to_json.
        """
        try:
            return _checked_layout(data, where)
        except _Damage as why:
            raise CheckpointError(f"{where} is damaged ({why}); remove it to have the files laid out anew") from None

    def locations(self) -> dict[str, list[tuple[str, int, TensorInfo]]]:
        """Where each tensor goes, aliases under the name that they repeat: (file, first byte, info)."""
        out: dict[str, list[tuple[str, int, TensorInfo]]] = {}
        for file, text in self.headers.items():
            base = 8 + len(text.encode())
            for name, (info, start) in _good(header_entries(text, ALL_DTYPES)[0], file).items():
                out.setdefault(self.aliases.get(name, name), []).append((file, base + start, info))
        return out

    def serves(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether exactly these tensors, with these dtypes and shapes, fit the recorded files."""
        found = {
            name: {(info.dtype, info.shape) for _, _, info in where}
            for name, where in self.locations().items()
            if name not in self.extras
        }
        return found == {name: {(info.dtype, info.shape)} for name, info in infos.items()}


def weight_map(text: str, where: str, rule: str) -> dict[str, str]:
    """The file of each tensor from the text of an index. where, rule: see path_inside.

    Raises CheckpointError for what is no index, and for a file that is not one of the folder's safetensors files.
    """
    found = parse_json_object(text, where, CheckpointError).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{where} is not an index: its weight_map must map tensor names to file names")
    for file in sorted(set(found.values())):
        path_inside(Path(), file, where, rule, suffix=SUFFIX)
    return found


class _Damage(Exception):
    """What is wrong with a recorded layout."""


def _checked_layout(data: Mapping[str, Any], where: str) -> Layout:
    if data.keys() != {"headers", "index", "aliases", "extras"}:
        raise _Damage(f"it has {short(sorted(data))}; a layout has headers, index, aliases and extras")
    headers, index, aliases, extras = (data[key] for key in ("headers", "index", "aliases", "extras"))
    for key in ("headers", "aliases", "extras"):
        if not isinstance(data[key], dict) or not all(isinstance(value, str) for value in data[key].values()):
            raise _Damage(f"{key} must map names to texts")
    if not headers or not isinstance(index, str | None):
        raise _Damage("it must name files, and the index must be a text or null")
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for file, text in headers.items():
        path_inside(Path(), file, where, RULE, suffix=SUFFIX)
        for name, info in _recorded_tensors(file, text).items():
            if name in tensors:
                raise _Damage(f"{short(name)} is in two files")
            tensors[name] = (file, info)
    if index is not None:
        try:
            listed = weight_map(index, f"the index in {where}", RULE)
        except CheckpointError as why:
            raise _Damage(str(why)) from None
        if listed != {name: file for name, (file, _) in tensors.items()}:
            raise _Damage("its index lists other tensors or files than its headers")
    if unknown := [name for name in (*aliases, *extras) if name not in tensors]:
        raise _Damage(f"no header has {short(unknown[0])}")
    data_of = {}
    for name, text in extras.items():
        nbytes = tensors[name][1].nbytes
        try:
            data_of[name] = bytes.fromhex(text)
        except ValueError:
            raise _Damage(f"the bytes of {short(name)} are not hexadecimal") from None
        if name in aliases or not BUFFER.search(name) or not nbytes == len(data_of[name]) <= MAX_BUFFER_BYTES:
            raise _Damage(f"{short(name)} of {nbytes} bytes is no buffer of rotary frequencies")
    return Layout(headers, index, aliases, data_of)


def _good(entries: Mapping[str, tuple[TensorInfo, int] | str], file: str) -> dict[str, tuple[TensorInfo, int]]:
    for name, entry in entries.items():
        if isinstance(entry, str):
            raise _Damage(f"{file}: {short(name)} {entry}")
    return dict(entries)  # type: ignore[arg-type]  # mypy does not see the loop


def _recorded_tensors(file: str, text: str) -> dict[str, TensorInfo]:
    """The tensors of one recorded header, which must follow each other without gaps, as the official reader asks."""
    try:
        entries, repeated = header_entries(text)
    except CheckpointError as why:
        raise _Damage(f"{file}: {why}") from None
    good = [(start, info, name) for name, (info, start) in _good(entries, file).items()]
    if repeated or len(text.encode()) > MAX_HEADER_BYTES:
        raise _Damage(f"{file}: a tensor is given twice, or the header is longer than {MAX_HEADER_BYTES} bytes")
    end, infos = 0, {}
    for start, info, name in sorted(good, key=lambda row: (row[0], row[1].nbytes)):
        if start != end:
            raise _Damage(f"{file}: {short(name)} begins at byte {start}, and the tensor before it ends at {end}")
        end, infos[name] = start + info.nbytes, info
    return infos


def new_layout(infos: Mapping[str, TensorInfo], max_shard_bytes: int = SHARD_BYTES) -> Layout:
    """Spreads tensors over files of at most max_shard_bytes (a larger tensor gets its own), named as the Hub's are."""
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in infos.items():
        if shards[-1] and info.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = info
        room -= info.nbytes
    # Larger dtypes first, so that each tensor begins at a multiple of its item size.
    texts = [header_text(dict(sorted(s.items(), key=lambda kv: -kv[1].dtype.itemsize))) for s in shards]
    if len(shards) == 1:
        return Layout({SINGLE: texts[0]})
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return Layout(dict(zip(files, texts, strict=True)), json.dumps(index, indent=2) + "\n")
