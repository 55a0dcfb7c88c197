# SPDX-License-Identifier: Apache-2.0
"""The block types of GGUF files: bytes to integers in groups, each group with a scale and perhaps an offset.

Every type is w = scale * q - offset with q in int8, in float32 and in this order, which gives the bits of llama.cpp's
own dequantisation (the layouts: ggml-quants.c of llama.cpp, MIT). d and m are float16 numbers of a block; a K-quant
multiplies them with small integers of its sub-blocks to make scale and offset.

n blocks of one tensor, G groups of a block.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from qwen2_jax.checkpoint.formats.stored_tensor import GroupLayout
from qwen2_jax.errors import CheckpointError

Split = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # q int8 [n, G, weights of a group], scale [n, G], offset


@dataclasses.dataclass(frozen=True)
class BlockType:
    """name: llama.cpp's. weights, nbytes: of a block. split: uint8 [n, nbytes] to integers, scales and offsets.

    lowest: of the integers, where they fit into 4 bits; None where they need 8.
    """

    name: str
    weights: int
    nbytes: int
    split: Callable[[np.ndarray], Split]
    lowest: int | None = None

    @functools.cached_property
    def layout(self) -> GroupLayout:
        q, _, offset = self.split(np.zeros((1, self.nbytes), np.uint8))
        return GroupLayout(q.shape[-1], 8 if self.lowest is None else 4, offset is not None)

    def integers(self, raw: np.ndarray) -> Split:
        """As `split`, with integers of -8 to 7 where they fit into 4 bits: what is taken off them goes to the offset,
        which is rounded once. Raises CheckpointError for a scale that is not finite."""
        with np.errstate(invalid="ignore", over="ignore"):
            q, scale, offset = self.split(raw)
        self._check(scale, offset)
        if self.lowest == 0 and offset is not None:
            q, offset = q - np.int8(8), offset - 8 * scale
        return q, scale, offset

    def _check(self, scale: np.ndarray, offset: np.ndarray | None) -> None:
        if not (np.isfinite(scale).all() and (offset is None or np.isfinite(offset).all())):
            raise CheckpointError(f"a block of {self.name} has a scale that is not finite; the file is damaged")

    def dequantize(self, raw: np.ndarray) -> np.ndarray:
        """float32 [n, weights] of uint8 [n, nbytes]. Raises CheckpointError for a scale that is not finite."""
        with np.errstate(invalid="ignore", over="ignore"):  # of scales that are refused below
            q, scale, offset = self.split(raw)
        self._check(scale, offset)
        weights = q.astype(np.float32)
        weights *= scale[..., None]
        if offset is not None:
            weights -= offset[..., None]
        return weights.reshape(len(raw), self.weights)


def _float16(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of each block, as float32 [n, 1]."""
    return raw[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """[..., b] -> [..., 2b]: the low four bits of each byte, then the high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _bits(x: np.ndarray, width: int) -> np.ndarray:
    """[..., b] bytes -> [..., 8 // width, b]: the fields of `width` bits, from the lowest up."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (x[..., None, :] >> shifts) & np.uint8(2**width - 1)


def _signed(q: np.ndarray, minus: int) -> np.ndarray:
    return q.view(np.int8) - np.int8(minus)


# ---------------------------------------------------------------------- blocks of 32, one group


def _q4_0(raw: np.ndarray) -> Split:
    return _signed(_nibbles(raw[:, None, 2:]), 8), _float16(raw, 0), None


def _q4_1(raw: np.ndarray) -> Split:
    return _nibbles(raw[:, None, 4:]).view(np.int8), _float16(raw, 0), -_float16(raw, 2)


def _fifth_bits(raw: np.ndarray, at: int) -> np.ndarray:
    """Bit i of the 32 bits at a byte, as 16 times itself, for weight i: [n, 1, 32]."""
    return np.unpackbits(raw[:, None, at : at + 4], axis=-1, bitorder="little") << 4


def _q5_0(raw: np.ndarray) -> Split:
    return _signed(_nibbles(raw[:, None, 6:]) | _fifth_bits(raw, 2), 16), _float16(raw, 0), None


def _q5_1(raw: np.ndarray) -> Split:
    return (_nibbles(raw[:, None, 8:]) | _fifth_bits(raw, 4)).view(np.int8), _float16(raw, 0), -_float16(raw, 2)


def _q8_0(raw: np.ndarray) -> Split:
    return raw[:, None, 2:].view(np.int8), _float16(raw, 0), None


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the value of E2M1


def _iq4_nl(raw: np.ndarray) -> Split:
    return _IQ4[_nibbles(raw[:, None, 2:])], _float16(raw, 0), None


def _mxfp4(raw: np.ndarray) -> Split:
    return _FP4[_nibbles(raw[:, None, 1:])], np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128), None


# ---------------------------------------------------------------------- blocks of 256, in groups of 16 or 32


def _q2_k(raw: np.ndarray) -> Split:
    n, scales = len(raw), raw[:, :16]
    q = _bits(raw[:, 16:80].reshape(n, 2, 32), 2).reshape(n, 16, 16)
    return q.view(np.int8), _float16(raw, 80) * (scales & 15), _float16(raw, 82) * (scales >> 4)


def _q3_k(raw: np.ndarray) -> Split:
    n, packed = len(raw), raw[:, 96:108]
    low = _bits(raw[:, 32:96].reshape(n, 2, 32), 2).reshape(n, 256)
    high = _bits(raw[:, :32], 1).reshape(n, 256)
    q = _signed(low | high << 2, 4).reshape(n, 16, 16)
    scale = _signed(_nibbles(packed[:, :8]) | _bits(packed[:, 8:], 2).reshape(n, 16) << 4, 32)
    return q, _float16(raw, 108) * scale, None


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits each, in 12 bytes: uint8 [n, 8] twice."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, mins


def _q4_k(raw: np.ndarray) -> Split:
    scales, mins = _scales_and_mins(raw[:, 4:16])
    q = _bits(raw[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return q.view(np.int8), _float16(raw, 0) * scales, _float16(raw, 2) * mins


def _q5_k(raw: np.ndarray) -> Split:
    scales, mins = _scales_and_mins(raw[:, 4:16])
    q = _bits(raw[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32) | _bits(raw[:, 16:48], 1) << 4
    return q.view(np.int8), _float16(raw, 0) * scales, _float16(raw, 2) * mins


def _q6_k(raw: np.ndarray) -> Split:
    n = len(raw)
    low = _nibbles(raw[:, :128].reshape(n, 2, 64)).reshape(n, 256)
    high = _bits(raw[:, 128:192].reshape(n, 2, 32), 2).reshape(n, 256)
    q = _signed(low | high << 4, 32).reshape(n, 16, 16)
    return q, _float16(raw, 208) * raw[:, 192:208].view(np.int8), None


def _iq4_xs(raw: np.ndarray) -> Split:
    n = len(raw)
    high = _bits(raw[:, 2:4], 2).swapaxes(1, 2).reshape(n, 8)
    low = _bits(raw[:, 4:8], 4).swapaxes(1, 2).reshape(n, 8)
    q = _IQ4[_nibbles(raw[:, 8:].reshape(n, 8, 16))]
    return q, _float16(raw, 0) * _signed(low | high << 4, 32), None


PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
BLOCKS = {
    2: BlockType("Q4_0", 32, 18, _q4_0, -8),
    3: BlockType("Q4_1", 32, 20, _q4_1, 0),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k, 0),
    11: BlockType("Q3_K", 256, 110, _q3_k, -4),
    12: BlockType("Q4_K", 256, 144, _q4_k, 0),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
REFUSED = {  # by name: large code books, ternary weights, types that llama.cpp removed
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
