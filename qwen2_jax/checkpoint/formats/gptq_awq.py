# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ: integers of 4 or 8 bits in int32 words, with a scale and a zero point for each group of inputs.

w[f, k] = scales[group of k, f] * (q[k, f] - zero[group of k, f]), in float32. GPTQ (Frantar et al. 2022,
arXiv:2210.17323) packs along the inputs; AWQ (Lin et al. 2023, arXiv:2306.00978) along the outputs, in another order.

K inputs, F outputs, G groups, R rows (outputs) that are decoded at a time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from qwen2_jax.checkpoint.formats.safetensors import TensorInFile
from qwen2_jax.checkpoint.formats.stored_tensor import DecodedTensor, GroupLayout, Integers, StoredTensor
from qwen2_jax.errors import CheckpointError

FLOATS, INDICES = ("float16", "bfloat16", "float32"), ("int32", "int64")
DTYPES = {"qweight": ("int32",), "qzeros": ("int32",), "scales": FLOATS, "g_idx": INDICES, "weight": ()}
LARGEST = 2**31 - 1  # of a group's or a block's size
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output j of a word is its nibble AWQ_ORDER[j]


def unpack(words: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words, each with 32 / bits values along one of two dimensions, low bits first, as uint8."""
    places = np.array(order or range(32 // bits), np.uint32) * np.uint32(bits)
    words = np.ascontiguousarray(words).view(np.uint32)
    mask = np.uint32(2**bits - 1)
    if axis == 0:
        values = (words[:, None, :] >> places[:, None]) & mask
        return values.astype(np.uint8).reshape(-1, words.shape[1])
    return ((words[..., None] >> places) & mask).astype(np.uint8).reshape(words.shape[0], -1)


def setting(settings: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """One value of quantization_config. Raises CheckpointError where it is missing, of another type or too large."""
    value = settings.get(name)
    value = default if value is None else value
    if type(value) is not kind:
        raise CheckpointError(f"{name} is {value!r:.60}; it must be of type {kind.__name__}")
    if isinstance(value, int) and value > LARGEST:
        raise CheckpointError(f"{name} is {value!r:.60}; it must be at most {LARGEST:,}")
    return value


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise CheckpointError(f"{name} is {value!r:.60}; supported: {', '.join(map(repr, allowed))}")
    return value


def shape_of(parts: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], why: str) -> None:
    """Raises CheckpointError where a part is missing or has another shape."""
    if name not in parts:
        raise CheckpointError(f"has no {name}")
    if parts[name].shape != shape:
        raise CheckpointError(f"{name} is {list(parts[name].shape)}; {why} asks for {list(shape)}")


def of_dtype(parts: Mapping[str, StoredTensor], dtypes: Mapping[str, tuple[str, ...]]) -> None:
    """Raises CheckpointError where a part has none of its dtypes; () stands for a part that may not be there."""
    for name, allowed in dtypes.items():
        if name in parts and parts[name].dtype.name not in allowed:
            expected = f"it must be {' or '.join(allowed)}" if allowed else "packed tensors take its place"
            raise CheckpointError(f"{name} is {parts[name].dtype.name}; {expected}")


def dimensions(parts: Mapping[str, StoredTensor], name: str) -> tuple[int, int]:
    if name not in parts:
        raise CheckpointError(f"has no {name}")
    if len(parts[name].shape) != 2 or 0 in parts[name].shape:
        raise CheckpointError(f"{name} is {list(parts[name].shape)}; it must have two dimensions, neither of them 0")
    return parts[name].shape  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Gptq:
    """The settings of a GPTQ checkpoint. group_size: inputs of a group, -1 for all. reordered: groups are not of
    neighbouring inputs, so that g_idx must say which they are."""

    bits: int
    group_size: int
    symmetric: bool
    v2: bool
    reordered: bool
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        if settings.get("is_marlin_format"):
            raise CheckpointError("is_marlin_format is true; the marlin layout is not read")
        form = one_of("checkpoint_format", settings.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2"))
        one_of("pack_dtype", settings.get("pack_dtype") or "int32", ("int32",))
        if settings.get("dynamic"):
            raise CheckpointError("dynamic gives modules other bits or groups, which is not read")
        bits = one_of("bits", setting(settings, "bits", int), (4, 8))
        group_size = setting(settings, "group_size", int, -1)
        if group_size < 1 and group_size != -1:
            raise CheckpointError(f"group_size is {group_size}; it must be -1 (all inputs) or 1 and more")
        symmetric, reordered = setting(settings, "sym", bool, True), setting(settings, "desc_act", bool, False)
        return cls(bits, group_size, symmetric, form == "gptq_v2", reordered)

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        words, F = dimensions(parts, "qweight")
        of_dtype(parts, DTYPES)
        K, n = words * 32 // self.bits, 32 // self.bits
        group = K if self.group_size == -1 else self.group_size
        if "g_idx" in parts and parts["g_idx"].shape != (K,):
            raise CheckpointError(
                f"qweight has words for {K} inputs with bits {self.bits}; g_idx has {list(parts['g_idx'].shape)}"
            )
        why = f"group_size {group} of {K} inputs and {F} outputs with bits {self.bits}"
        if F % n:
            raise CheckpointError(f"{F} outputs are no whole words of {n}")
        groups = -(-K // group)
        if self.reordered and groups > 1 and "g_idx" not in parts:
            raise CheckpointError("has no g_idx, and desc_act is true")
        shape_of(parts, "scales", (groups, F), why)
        shape_of(parts, "qzeros", (groups, F // n), why)
        return DecodedTensor(np.dtype(np.float32), (F, K), dict(parts), _GptqDecoder(self, group, module))


@dataclasses.dataclass(frozen=True)
class _GptqDecoder:
    settings: Gptq
    group: int
    module: str

    @property
    def row_multiple(self) -> int:
        return 32 // self.settings.bits

    @property
    def kind(self) -> str:
        return f"GPTQ int{self.settings.bits}"

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout | None:
        """None where columns are not in the order of their groups ("act-order"), or do not fill the last one."""
        K = parts["qweight"].shape[0] * self.row_multiple
        if K % self.group or not np.array_equal(self._group_of_inputs(parts, K), np.arange(K) // self.group):
            return None
        return GroupLayout(self.group, self.settings.bits, not self.settings.symmetric)

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        q_KR, zero_GR, scale_GR = self._read(parts, rows)
        half = 1 << (self.settings.bits - 1)
        q_RK = (q_KR.T.astype(np.int16) - half).astype(np.int8)
        return q_RK, scale_GR.T, None if self.settings.symmetric else (scale_GR * (zero_GR - np.float32(half))).T

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        q_KR, zero_GR, scale_GR = self._read(parts, rows)
        group_K = self._group_of_inputs(parts, len(q_KR))
        w_KR = q_KR.astype(np.float32)
        w_KR -= zero_GR[group_K]
        w_KR *= scale_GR[group_K]
        return w_KR.T

    def _read(self, parts: Mapping[str, StoredTensor], rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(unsigned integers [K, R], zero points and scales [G, R] in float32)."""
        bits, n = self.settings.bits, self.row_multiple
        with parts["qweight"].mapped() as words:
            q_KR = unpack(words[:, rows], bits, axis=0)
        with parts["qzeros"].mapped() as words:
            zero_GR = self._zeros(unpack(words[:, rows.start // n : -(-rows.stop // n)], bits, axis=1))
        with parts["scales"].mapped() as scales:
            scale_GR = scales[:, rows].astype(np.float32)
        return q_KR, zero_GR, scale_GR

    def _group_of_inputs(self, parts: Mapping[str, StoredTensor], K: int) -> np.ndarray:
        if "g_idx" not in parts:
            return np.arange(K) // self.group
        with parts["g_idx"].mapped() as array:
            group_K = np.array(array)
        if group_K.min(initial=0) < 0 or group_K.max(initial=0) >= parts["scales"].shape[0]:
            raise CheckpointError(f"{self.module}: g_idx names groups that are not there")
        return group_K

    def _zeros(self, stored: np.ndarray) -> np.ndarray:
        """float32. Version 1 stores them less one. Of symmetric weights both spellings exist, whatever the version."""
        half = 1 << (self.settings.bits - 1)
        if not self.settings.symmetric:
            return (stored if self.settings.v2 else stored + np.uint8(1) & np.uint8(2 * half - 1)).astype(np.float32)
        if not (np.all(stored == half) or np.all(stored == half - 1)):
            raise CheckpointError(f"{self.module}: sym is true, and qzeros hold others than {half - 1} or {half} only")
        return np.full(stored.shape, half, np.float32)


@dataclasses.dataclass(frozen=True)
class Awq:
    """The settings of an AWQ checkpoint, version gemm."""

    group_size: int
    suffixes = ("qweight", "qzeros", "scales")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        one_of("version", str(settings.get("version") or "gemm").lower(), ("gemm",))
        one_of("bits", setting(settings, "bits", int), (4,))
        one_of("zero_point", setting(settings, "zero_point", bool, True), (True,))
        group_size = setting(settings, "group_size", int)
        if group_size < 1 and group_size != -1:
            raise CheckpointError(f"group_size is {group_size}; it must be -1 (all inputs) or 1 and more")
        return cls(group_size)

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        K, words = dimensions(parts, "qweight")
        of_dtype(parts, DTYPES)
        group = K if self.group_size == -1 else self.group_size
        why = f"group_size {group} of {K} inputs and {8 * words} outputs"
        shape_of(parts, "scales", (-(-K // group), 8 * words), why)
        shape_of(parts, "qzeros", (-(-K // group), words), why)
        return DecodedTensor(np.dtype(np.float32), (8 * words, K), dict(parts), _AwqDecoder(group))


@dataclasses.dataclass(frozen=True)
class _AwqDecoder:
    group: int
    row_multiple: int = 8
    kind: str = "AWQ int4"

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout | None:
        return GroupLayout(self.group, 4, True) if parts["qweight"].shape[0] % self.group == 0 else None

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        q_KR, zero_GR, scale_GR = self._read(parts, rows)
        return q_KR.T.view(np.int8) - np.int8(8), scale_GR.T, (scale_GR * (zero_GR - np.float32(8))).T

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        q_KR, zero_GR, scale_GR = self._read(parts, rows)
        group_K = np.arange(len(q_KR)) // self.group
        w_KR = q_KR.astype(np.float32)
        w_KR -= zero_GR[group_K]
        w_KR *= scale_GR[group_K]
        return w_KR.T

    def _read(self, parts: Mapping[str, StoredTensor], rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(unsigned integers [K, R], zero points and scales [G, R] in float32)."""
        words = slice(rows.start // 8, -(-rows.stop // 8))
        with parts["qweight"].mapped() as q, parts["qzeros"].mapped() as zeros, parts["scales"].mapped() as scales:
            q_KR = unpack(q[:, words], 4, 1, AWQ_ORDER)
            return q_KR, unpack(zeros[:, words], 4, 1, AWQ_ORDER).astype(np.float32), scales[:, rows].astype(np.float32)
