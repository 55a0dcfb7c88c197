# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors (vLLM's llm-compressor) and FP8 folders: packed integers, int8 or float8 with scales.

Only weights are dequantised. What a file says about rounding activations is left out: the result is more exact.

K inputs, F outputs, G groups, R rows (outputs) that are decoded at a time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from qwen2_jax.checkpoint.formats.gptq_awq import (
    FLOATS,
    INDICES,
    LARGEST,
    dimensions,
    of_dtype,
    one_of,
    setting,
    shape_of,
    unpack,
)
from qwen2_jax.checkpoint.formats.safetensors import TensorInFile
from qwen2_jax.checkpoint.formats.stored_tensor import DecodedTensor, GroupLayout, Integers, StoredTensor
from qwen2_jax.errors import CheckpointError

FLOAT32 = np.dtype(np.float32)
DTYPES = {
    "weight_packed": ("int32",),
    "weight_scale": FLOATS,
    "weight_zero_point": ("int32",),
    "weight": (),
    "weight_shape": INDICES,
    "weight_g_idx": INDICES,
}
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The settings of a compressed-tensors checkpoint. bits: of packed integers, None where nothing is packed."""

    bits: int | None
    block: tuple[int, int] | None
    suffixes = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        form = one_of("format", setting(settings, "format", str), FORMATS)
        if settings.get("sparsity_config"):
            raise CheckpointError("sparsity_config is given; sparse weights are not read")
        groups = setting(settings, "config_groups", dict)
        schemes: list[dict[str, Any]] = []
        for group in groups.values():
            if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
                raise CheckpointError("config_groups must be objects with an object called weights")
            if group.get("format") not in (None, form):
                raise CheckpointError("config_groups have formats of their own, which is not read")
            schemes.append(group["weights"])
        if not schemes:
            raise CheckpointError("config_groups is empty")
        bits = {setting(scheme, "num_bits", int) for scheme in schemes}
        if len(bits) > 1:
            raise CheckpointError(f"num_bits are {sorted(bits)} in several groups; one number for all is read")
        one_of("num_bits", min(bits), (4, 8))
        blocks = {_block(scheme["block_structure"]) for scheme in schemes if scheme.get("block_structure")}
        if len(blocks) > 1:
            raise CheckpointError(f"block_structure are {sorted(blocks)} in several groups; one for all is read")
        return cls(min(bits) if form == "pack-quantized" else None, min(blocks, default=None))

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        if self.bits is None:
            return _scaled(parts, "weight_scale", self.block)
        n = 32 // self.bits
        F, words = dimensions(parts, "weight_packed")
        of_dtype(parts, DTYPES)
        shape_of(parts, "weight_shape", (2,), "compressed-tensors")
        with parts["weight_shape"].mapped() as stored:
            shape = tuple(map(int, stored))
        if shape[0] != F or not 0 < shape[1] <= words * n or shape[1] <= (words - 1) * n:
            raise CheckpointError(f"weight_packed is {[F, words]} with num_bits {self.bits}; weight_shape says {shape}")
        _, G = dimensions(parts, "weight_scale")
        shape_of(parts, "weight_scale", (F, G), f"{F} outputs")
        if shape[1] % G and "weight_g_idx" not in parts:
            raise CheckpointError(f"weight_scale has {G} groups, which do not divide {shape[1]} inputs")
        if "weight_zero_point" in parts:
            shape_of(parts, "weight_zero_point", (-(-F // n), G), f"{F} outputs with num_bits {self.bits}")
        if "weight_g_idx" in parts:
            shape_of(parts, "weight_g_idx", (shape[1],), f"{shape[1]} inputs")
        return DecodedTensor(FLOAT32, shape, dict(parts), _Packed(self.bits, module))


@dataclasses.dataclass(frozen=True)
class _Packed:
    bits: int
    module: str

    @property
    def row_multiple(self) -> int:
        return 32 // self.bits  # zero points are packed along the outputs

    @property
    def kind(self) -> str:
        return f"compressed int{self.bits}"

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout | None:
        (K, G), offset = self._dimensions(parts), "weight_zero_point" in parts
        in_order = K % G == 0 and np.array_equal(self._group_of_inputs(parts, K, G), np.arange(K) // (K // G))
        return GroupLayout(K // G, self.bits, offset) if in_order else None

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        q_RK, zero_RG, scale_RG = self._read(parts, rows)
        return q_RK, scale_RG, None if zero_RG is None else scale_RG * zero_RG

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        q_RK, zero_RG, scale_RG = self._read(parts, rows)
        group_K = self._group_of_inputs(parts, q_RK.shape[1], scale_RG.shape[1])
        w_RK = q_RK.astype(np.float32)
        if zero_RG is not None:
            w_RK -= zero_RG[:, group_K]
        w_RK *= scale_RG[:, group_K]
        return w_RK

    def _dimensions(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """(K, G)."""
        with parts["weight_shape"].mapped() as shape:
            return int(shape[1]), parts["weight_scale"].shape[1]

    def _read(self, parts: Mapping[str, StoredTensor], rows: slice) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(integers [R, K], zero points [R, G] in float32 if there are any, scales [R, G] in float32)."""
        n, half, (K, _) = self.row_multiple, 1 << (self.bits - 1), self._dimensions(parts)
        with parts["weight_packed"].mapped() as words:
            q_RK = (unpack(words[rows], self.bits, axis=1)[:, :K].astype(np.int16) - half).astype(np.int8)
        with parts["weight_scale"].mapped() as scales:
            scale_RG = scales[rows].astype(np.float32)
        if "weight_zero_point" not in parts:
            return q_RK, None, scale_RG
        with parts["weight_zero_point"].mapped() as words:
            zero_RG = unpack(words[rows.start // n : -(-rows.stop // n)], self.bits, axis=0)[: len(q_RK)]
        return q_RK, zero_RG.astype(np.float32) - np.float32(half), scale_RG

    def _group_of_inputs(self, parts: Mapping[str, StoredTensor], K: int, G: int) -> np.ndarray:
        if "weight_g_idx" not in parts:
            return np.arange(K) // (K // G)
        with parts["weight_g_idx"].mapped() as array:
            group_K = np.array(array)
        if group_K.min(initial=0) < 0 or group_K.max(initial=0) >= G:
            raise CheckpointError(f"{self.module}: weight_g_idx names groups that are not there")
        return group_K


@dataclasses.dataclass(frozen=True)
class Fp8:
    """The settings of an FP8 checkpoint. block: rows and columns that share a scale, None for one or one per output."""

    block: tuple[int, int] | None
    suffixes = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        one_of("fmt", settings.get("fmt") or "e4m3", ("e4m3",))
        block = settings.get("weight_block_size")
        return cls(None if block is None else _block(block))

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        return _scaled(parts, "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale", self.block)


def _block(value: Any) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n <= LARGEST for n in value)):
        raise CheckpointError(f"the block size is {value!r:.60}; it must be two numbers, such as [128, 128]")
    return value[0], value[1]


def _scaled(parts: Mapping[str, TensorInFile], scale: str, block: tuple[int, int] | None) -> DecodedTensor:
    """A weight of int8 or float8 numbers, with one scale, one for each output, or one for each block."""
    F, K = dimensions(parts, "weight")
    of_dtype(parts, {"weight": ("int8", "float8_e4m3fn"), scale: FLOATS})
    if "weight_zero_point" in parts:
        raise CheckpointError("has a weight_zero_point; asymmetric int8 is not read")
    if scale not in parts:
        raise CheckpointError(f"has no {scale}")
    shape = parts[scale].shape
    wanted = [(), (1,), (1, 1), (F,), (F, 1)]
    if block is not None:
        wanted.append((-(-F // block[0]), -(-K // block[1])))
    if shape not in wanted:
        raise CheckpointError(f"{scale} is {list(shape)} for a weight of {[F, K]}")
    by_block = block if shape not in wanted[:5] else None
    return DecodedTensor(FLOAT32, (F, K), dict(parts), _Scaled(scale, by_block, parts["weight"].dtype.name))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    scale: str
    block: tuple[int, int] | None
    kind: str
    row_multiple: int = 1

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout | None:
        """A whole row is a group; float8 and scales of blocks are not integers in groups."""
        is_integer = parts["weight"].dtype == np.int8 and self.block is None
        return GroupLayout(parts["weight"].shape[1], 8, False) if is_integer else None

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        with parts["weight"].mapped() as q, parts[self.scale].mapped() as stored:
            scale = np.array(stored, np.float32).reshape(-1, 1)
            return np.array(q[rows]), scale[rows] if len(scale) > 1 else scale.repeat(rows.stop - rows.start, 0), None

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        with parts["weight"].mapped() as q, parts[self.scale].mapped() as stored:
            w_RK, scale = q[rows].astype(np.float32), np.array(stored, np.float32)
        if self.block is not None:
            of_row = np.arange(rows.start, rows.stop) // self.block[0]
            of_column = np.arange(w_RK.shape[1]) // self.block[1]
            return w_RK * scale[of_row][:, of_column]
        scale = scale.reshape(-1, 1)
        return w_RK * (scale if len(scale) == 1 else scale[rows])
