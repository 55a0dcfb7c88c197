# SPDX-License-Identifier: Apache-2.0
"""How tensors are spread over safetensors files: recorded, to write the very same files again, or made anew."""

import dataclasses
import json
from collections.abc import Mapping

from qwen2_jax.checkpoint.formats.safetensors import DTYPES, header_text
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors are spread over files, kept so that the same files can be written again.

    headers: header text by file name. index: text of the index, None for a single file. aliases: names that repeat
    another tensor (a tied head that is stored all the same). extras: bytes of harmless tensors that are no parameter.
    """

    headers: Mapping[str, str]
    index: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"extras": {name: data.hex() for name, data in self.extras.items()}}

    @classmethod
    def from_json(cls, data: dict) -> "Layout":
        return cls(**data | {"extras": {name: bytes.fromhex(text) for name, text in data["extras"].items()}})

    def locations(self) -> dict[str, list[tuple[str, int, TensorInfo]]]:
        """Where each tensor goes, aliases under the name that they repeat: (file, first byte, info)."""
        out: dict[str, list[tuple[str, int, TensorInfo]]] = {}
        for file, text in self.headers.items():
            base = 8 + len(text.encode())
            for name, entry in json.loads(text).items():
                if name != "__metadata__":
                    info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                    location = (file, base + entry["data_offsets"][0], info)
                    out.setdefault(self.aliases.get(name, name), []).append(location)
        return out

    def serves(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether exactly these tensors, with these dtypes and shapes, fit the recorded files."""
        found = {
            name: {(info.dtype, info.shape) for _, _, info in where}
            for name, where in self.locations().items()
            if name not in self.extras
        }
        return found == {name: {(info.dtype, info.shape)} for name, info in infos.items()}


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
