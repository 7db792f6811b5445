# pyright: basic
"""Blocks of numbers in GGUF files, as numbers.

A row of a tensor is stored as blocks of 32 or 256 elements. Each block has scales and small
integers. The layouts are those of ggml's `ggml-common.h`, the formulas those of its
`dequantize_row_*`; the order of operations is the same, so results are equal to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

Expand = Callable[[np.ndarray], np.ndarray]
"""Blocks, uint8 [n, size_bytes] -> values, float32 [n, elements]."""


@dataclass(frozen=True)
class BlockType:
    """How the elements of a tensor are stored."""

    name: str
    elements: int
    """Elements of a block."""
    size_bytes: int
    """Bytes of a block."""
    dtype: np.dtype[Any]
    """Dtype of the values."""
    expand: Expand | None = None
    """None: the block is one plain number."""


def _floats(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte of each block, [n, 1]."""
    return blocks[:, start : start + 2].view(np.float16).astype(np.float32)


def _fields(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Fields of `bits` bits of bytes [n, k], the low ones of `width` bytes first: [n, k * 8/bits].

    Bytes are taken `width` at a time: first the lowest field of each of them, then the next.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    parts = data.reshape(len(data), -1, 1, width) >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(data), -1)


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """The bits of four bytes, lowest first, as the fifth bit: [n, 32]."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _scaled(scale: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """One scale for each run of integers: [n, runs] and [n, elements] -> [n, runs, width]."""
    return scale[:, :, None] * quants.reshape(*scale.shape, -1).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """Computes d * (q - 8)."""
    return _floats(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """Computes d * q + m."""
    return _floats(blocks, 0) * _fields(blocks[:, 4:], 4, 16) + _floats(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    """Computes d * (q - 16); the fifth bits of q stand before the others."""
    quants = _fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6])
    return _floats(blocks, 0) * (quants.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    """Computes d * q + m."""
    quants = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8])
    return _floats(blocks, 0) * quants + _floats(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """Computes d * q."""
    return _floats(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    """Computes (d * scale) * q - (dmin * min); 16 runs, whose scales and mins are 4 bits each."""
    scales, quants = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    minimum = _floats(blocks, 82) * (scales >> 4)
    return _scaled(_floats(blocks, 80) * (scales & 15), quants) - minimum[:, :, None]


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """Computes (d * (scale - 32)) * (q - 4); the third bits of q have a mask of their own."""
    high = _fields(blocks[:, :32], 1, 32) << np.uint8(2)
    quants = (_fields(blocks[:, 32:96], 2, 32) | high).astype(np.int8) - np.int8(4)
    low_scale = _fields(blocks[:, 96:104], 4, 8)
    high_scale = _fields(blocks[:, 104:108], 2, 4) << np.uint8(4)
    scale = (low_scale | high_scale).astype(np.int8) - np.int8(32)
    return _scaled(_floats(blocks, 108) * scale, quants)


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight mins of 6 bits, from 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = [first & 63, (rest & 15) | ((first >> 6) << 4)]
    minimum = [second & 63, (rest >> 4) | ((second >> 6) << 4)]
    return np.concatenate(scale, axis=1), np.concatenate(minimum, axis=1)


def _q45_k(blocks: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """Computes (d * scale) * q - (dmin * min); 8 runs."""
    scale, minimum = _k_scales(blocks[:, 4:16])
    lowest = _floats(blocks, 2) * minimum
    return _scaled(_floats(blocks, 0) * scale, quants) - lowest[:, :, None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Integers have 4 bits."""
    return _q45_k(blocks, _fields(blocks[:, 16:], 4, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    """Integers have 5 bits; the fifth bits stand before the others."""
    high = _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _q45_k(blocks, _fields(blocks[:, 48:], 4, 32) | high)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Computes (d * scale) * (q - 32); 16 runs, whose scales are of 8 bits."""
    low, high = _fields(blocks[:, :128], 4, 64), _fields(blocks[:, 128:192], 2, 32)
    quants = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    return _scaled(_floats(blocks, 208) * blocks[:, 192:208].view(np.int8), quants)


_F32 = np.dtype(np.float32)
BLOCK_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: BlockType("F32", 1, 4, _F32),
        1: BlockType("F16", 1, 2, np.dtype(np.float16)),
        2: BlockType("Q4_0", 32, 18, _F32, _q4_0),
        3: BlockType("Q4_1", 32, 20, _F32, _q4_1),
        6: BlockType("Q5_0", 32, 22, _F32, _q5_0),
        7: BlockType("Q5_1", 32, 24, _F32, _q5_1),
        8: BlockType("Q8_0", 32, 34, _F32, _q8_0),
        10: BlockType("Q2_K", 256, 84, _F32, _q2_k),
        11: BlockType("Q3_K", 256, 110, _F32, _q3_k),
        12: BlockType("Q4_K", 256, 144, _F32, _q4_k),
        13: BlockType("Q5_K", 256, 176, _F32, _q5_k),
        14: BlockType("Q6_K", 256, 210, _F32, _q6_k),
        30: BlockType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    }
)
"""By ggml's number of the type."""
OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
        19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
        26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
        33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
    }
)  # fmt: skip
"""Types that are refused by name."""
ELEMENTS_AT_ONCE = 1 << 18
"""Bounds what is in memory besides the tensor itself."""


def expand(kind: BlockType, data: np.ndarray) -> np.ndarray:
    """Values of blocks: uint8 [rows, bytes of a row] -> float32 [rows, elements of a row]."""
    assert kind.expand is not None
    blocks = data.reshape(-1, kind.size_bytes)
    values = np.empty((len(blocks), kind.elements), np.float32)
    step = ELEMENTS_AT_ONCE // kind.elements
    with np.errstate(invalid="ignore"):  # an infinite scale times zero, in a damaged file
        for start in range(0, len(blocks), step):
            part = kind.expand(blocks[start : start + step])
            values[start : start + step] = part.reshape(-1, kind.elements)
    return values.reshape(len(data), data.shape[1] // kind.size_bytes * kind.elements)
