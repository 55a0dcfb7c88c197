# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: int8, and 4-bit code books in blocks of the flat weight (Dettmers et al. 2023, arXiv:2305.14314).

F outputs, K inputs, R rows (outputs) that are decoded at a time.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from qwen2_jax.checkpoint.formats.gptq_awq import FLOATS, dimensions, of_dtype, setting, shape_of
from qwen2_jax.checkpoint.formats.safetensors import TensorInFile
from qwen2_jax.checkpoint.formats.stored_tensor import (
    DecodedTensor,
    GroupLayout,
    Integers,
    NotInGroups,
    StoredTensor,
)
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.json_text import parse_json_object

STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """The settings of a bitsandbytes checkpoint: 8 bits, or 4."""

    eight: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        if self.eight:
            return ("SCB", "weight_format")
        parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        return (*STATES, *(f"weight.{part}" for part in parts))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        eight, four = (setting(settings, f"load_in_{bits}bit", bool, False) for bits in (8, 4))
        if eight == four:
            raise CheckpointError(f"load_in_8bit is {eight} and load_in_4bit {four}; one of them must be true")
        return cls(eight)

    def weight(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        if self.eight:
            F, K = dimensions(parts, "weight")
            shape_of(parts, "SCB", (F,), f"{F} outputs")
            of_dtype(parts, {"weight": ("int8",), "SCB": FLOATS})
            return DecodedTensor(FLOAT32, (F, K), dict(parts), _Int8())
        return self._four_bits(module, parts)

    def _four_bits(self, module: str, parts: Mapping[str, TensorInFile]) -> DecodedTensor:
        name = next((name for name in STATES if name in parts), None)
        if name is None or "weight" not in parts:
            raise CheckpointError(f"has no {'weight' if name else STATES[0]}")
        of_dtype(parts, {"weight": ("uint8",), name: ("uint8",), "weight.absmax": ("uint8", *FLOATS)})
        of_dtype(parts, {f"weight.{part}": FLOATS for part in ("quant_map", "nested_quant_map", "nested_absmax")})
        with parts[name].mapped() as raw:
            state = parse_json_object(raw.tobytes(), f"{module}.{name}", CheckpointError)
        shape, block = state.get("shape"), setting(state, "blocksize", int)
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise CheckpointError(f"shape is {shape!r:.60}; it must be two numbers")
        entries = math.prod(shape)
        if block < 1 or shape[1] % 2 or math.prod(parts["weight"].shape) != entries // 2:
            raise CheckpointError(f"weight is {list(parts['weight'].shape)}, which is not {shape} in 4 bits")
        blocks = -(-entries // block)
        shape_of(parts, "weight.quant_map", (16,), "4 bits")
        shape_of(parts, "weight.absmax", (blocks,), f"{entries} numbers in blocks of {block}")
        nested = 0
        if parts["weight.absmax"].dtype == np.uint8:
            nested = setting(state, "nested_blocksize", int)
            if nested < 1:
                raise CheckpointError(f"nested_blocksize is {nested}")
            shape_of(parts, "weight.nested_quant_map", (256,), "absmax in 8 bits")
            shape_of(parts, "weight.nested_absmax", (-(-blocks // nested),), f"{blocks} blocks, {nested} together")
        offset = state.get("nested_offset") or 0.0
        if type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > np.finfo(np.float32).max:
            raise CheckpointError(f"nested_offset is {offset!r:.60}; it must be a finite number")
        decoder = _FourBits(shape[1], block, nested, float(offset), name[-3:])
        return DecodedTensor(FLOAT32, (shape[0], shape[1]), dict(parts), decoder)


@dataclasses.dataclass(frozen=True)
class _Int8:
    row_multiple: int = 1
    kind: str = "bitsandbytes int8"

    def groups(self, parts: Mapping[str, StoredTensor]) -> GroupLayout:
        return GroupLayout(parts["weight"].shape[1], 8, False)

    def split(self, parts: Mapping[str, StoredTensor], rows: slice) -> Integers:
        with parts["weight"].mapped() as q, parts["SCB"].mapped() as largest:
            return np.array(q[rows]), largest[rows, None].astype(np.float32) / np.float32(127), None

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        with parts["weight"].mapped() as q, parts["SCB"].mapped() as largest:
            return q[rows].astype(np.float32) * (largest[rows, None].astype(np.float32) / np.float32(127))


@dataclasses.dataclass(frozen=True)
class _FourBits(NotInGroups):
    """nested: blocks whose largest values share a scale, 0 where these are float32."""

    K: int
    block: int
    nested: int
    offset: float
    code: str
    row_multiple: int = 1

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.code}"

    def decode(self, parts: Mapping[str, StoredTensor], rows: slice) -> np.ndarray:
        first, last = rows.start * self.K, rows.stop * self.K
        with parts["weight"].mapped() as stored, parts["weight.quant_map"].mapped() as code:
            flat = stored.reshape(-1)[first // 2 : last // 2]
            values = np.array(code, np.float32)[np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)]
        of_block = slice(first // self.block, -(-last // self.block))
        largest = self._largest(parts, of_block)
        values *= largest[np.arange(first, last) // self.block - of_block.start]
        return values.reshape(-1, self.K)

    def _largest(self, parts: Mapping[str, StoredTensor], blocks: slice) -> np.ndarray:
        """The largest absolute value of each of these blocks, float32."""
        with parts["weight.absmax"].mapped() as stored:
            absmax = np.array(stored[blocks])
        if not self.nested:
            return absmax.astype(np.float32)
        with parts["weight.nested_quant_map"].mapped() as code, parts["weight.nested_absmax"].mapped() as scales:
            scale = np.array(scales, np.float32)[np.arange(blocks.start, blocks.stop) // self.nested]
            return np.array(code, np.float32)[absmax] * scale + np.float32(self.offset)
