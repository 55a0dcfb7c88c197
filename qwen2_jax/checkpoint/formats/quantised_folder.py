# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders with quantised weights, as `quantization_config` describes them. Each method has its own file.

A method says which tensors of the files make one weight and how they are decoded (stored_tensor.Decoder). Weights are
dequantised in float32, a block of rows at a time, when they are read. What a method does not cover is refused by name.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen2_jax.checkpoint.formats import bitsandbytes, compressed_tensors, gptq_awq
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.formats.names import Slot, Tree, table
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.safetensors import ALL_DTYPES, DTYPES, TensorInFile
from qwen2_jax.checkpoint.formats.small_files import CONFIG, MAX_JSON_BYTES, FolderFiles, SmallFiles
from qwen2_jax.checkpoint.formats.stored_tensor import DecodedTensor, StoredTensor
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.json_text import parse_json_object

KEYS = ("quantization_config", "compression_config")  # of config.json; the second is of older compressed-tensors
BESIDE = "quantize_config.json"  # of older GPTQ folders, in place of the key


class Method(Protocol):
    """One way to store weights, with the settings of one checkpoint.

    suffixes: of the tensors that belong to a module's weight beside `weight` itself; "scales" for NAME.scales.
    """

    @property
    def suffixes(self) -> Collection[str]: ...

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        """The weight of a module from its tensors, by suffix. Raises CheckpointError where they do not fit together."""


METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "gptq": gptq_awq.Gptq.from_settings,
    "awq": gptq_awq.Awq.from_settings,
    "compressed-tensors": compressed_tensors.CompressedTensors.from_settings,
    "fp8": compressed_tensors.Fp8.from_settings,
    "bitsandbytes": bitsandbytes.BitsAndBytes.from_settings,
}


def _settings(path: Path) -> dict[str, Any] | None:
    """What the folder says of its quantisation, None where it says nothing."""
    content = FolderFiles(path).read_bytes(CONFIG, MAX_JSON_BYTES)
    config = {} if content is None else parse_json_object(content, str(path / CONFIG), CheckpointError)
    for key in KEYS:
        if config.get(key) is not None:
            if not isinstance(config[key], dict):
                raise CheckpointError(f"{path / CONFIG}: {key} is {config[key]!r:.60}; it must be an object")
            return config[key]
    beside = FolderFiles(path).read_bytes(BESIDE, MAX_JSON_BYTES)
    if beside is None:
        return None
    return {"quant_method": "gptq"} | parse_json_object(beside, str(path / BESIDE), CheckpointError)


def _method(path: Path) -> Method:
    settings = _settings(path)
    name = (settings or {}).get("quant_method")
    if settings is None or not isinstance(name, str) or name not in METHODS:
        raise CheckpointError(f"{path}: quant_method is {name!r:.60}; supported: {', '.join(METHODS)}")
    try:
        return METHODS[name](settings)
    except CheckpointError as why:
        raise CheckpointError(f"{path}: quantization_config: {why}") from None


class QuantisedFolder(HfFolder):
    """An opened folder with quantised weights; see HfFolder."""

    dtypes = ALL_DTYPES

    def __init__(self, path: Path):
        self.method = _method(path)
        super().__init__(path)

    def weights(self, in_files: Mapping[str, TensorInFile]) -> dict[str, StoredTensor]:
        modules: dict[str, dict[str, TensorInFile]] = {}
        weights: dict[str, StoredTensor] = {}
        for name, tensor in in_files.items():
            suffix = next((s for s in self.method.suffixes if name.endswith("." + s)), None)
            if suffix is None:
                weights[name] = tensor
            else:
                modules.setdefault(name.removesuffix("." + suffix), {})[suffix] = tensor
        for module, parts in modules.items():
            plain = weights.pop(f"{module}.weight", None)
            if isinstance(plain, TensorInFile):
                parts["weight"] = plain
            try:
                weights[f"{module}.weight"] = self.method.weight(module, parts)
            except CheckpointError as why:
                self.errors.add("contradiction", [f"{module}: {why}"])
        bare = (name for name, tensor in weights.items() if tensor.dtype not in DTYPES.values())
        self.errors.add("without its scales", (name for name in bare if name.endswith(".weight")))
        return weights

    def check(self, table: Mapping[str, Slot], *, tied: bool) -> "QuantisedFolder":
        """As HfFolder; biases that the model does not have may be spelled out, if they are zero."""
        for name in [n for n in self.infos if n.endswith("_proj.bias") and n not in table]:
            with self.infos[name].mapped() as bias:
                if not bias.any():
                    del self.infos[name]
        super().check(table, tied=tied)
        return self

    def layout(self) -> None:
        """The files cannot be written again: nothing here quantises."""


class QuantisedFiles(FolderFiles):
    """The small files of the folder, with a config.json of the dequantised model."""

    def names(self) -> list[str]:
        return [name for name in super().names() if name != BESIDE]

    def read_bytes(self, name: str, limit: int | None = None) -> bytes | None:
        content = super().read_bytes(name, limit)
        if name != CONFIG or content is None:
            return content
        config = parse_json_object(content, str(self.path / CONFIG), CheckpointError)
        kept = {key: value for key, value in config.items() if key not in KEYS}
        for key in ("dtype", "torch_dtype"):  # activations of Qwen2 overflow in float16
            if kept.get(key) == "float16":
                kept[key] = "bfloat16"
        return json.dumps(kept, indent=2).encode()


def _looks_like(path: Any, names: Collection[str]) -> bool:
    if not isinstance(path, Path) or not any(name.endswith(".safetensors") for name in names):
        return False
    if BESIDE in names:
        return True
    return CONFIG in names and has_settings(path)


def has_settings(path: Path) -> bool:
    """Whether the folder says that its weights are quantised."""
    try:
        content = FolderFiles(path).read_bytes(CONFIG, MAX_JSON_BYTES) or b""
        named = any(key.encode() in content for key in KEYS) or (path / BESIDE).exists()
        return named and _settings(path) is not None
    except CheckpointError:
        return True  # whoever opens it gets the message


def _open(path: Path, files: SmallFiles, specs: Tree, *, tied: bool) -> QuantisedFolder:
    return QuantisedFolder(path).check(table(specs), tied=tied)


FORMAT = Format("quantised", "Hugging Face safetensors, quantised", _looks_like, _open, QuantisedFiles)
