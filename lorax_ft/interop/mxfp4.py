"""MXFP4 weights, as gpt-oss stores its experts: read, and dequantized (arxiv.org/abs/2310.10537).

A stack of E matrices of I inputs and O outputs is stored as

    X_blocks  [E, O, I / 32, 16] bytes  two codes a byte, the lower four bits first
    X_scales  [E, O, I / 32]     bytes  the exponent of each block of 32 values, plus 127

and the value of a code c in a block with the exponent e is VALUES[c] · 2^e.
"""

from __future__ import annotations

import numpy as np

from lorax_ft.interop.lazy_tensor import Index, LazyTensor, Tensors

BLOCKS = "_blocks"
SCALES = "_scales"
BLOCK = 32  # values with one exponent
BIAS = 127  # of the exponents
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The highest of a code's four bits is its sign.
NEGATIVE = tuple(-value for value in POSITIVE)
VALUES = np.array(POSITIVE + NEGATIVE, np.float32)
BYTES = np.arange(256)
LOWER = BYTES & 0x0F
UPPER = BYTES >> 4
PAIRS = np.stack([VALUES[LOWER], VALUES[UPPER]], axis=-1)
"""The two values of a byte of codes, `[256, 2]`."""
with np.errstate(over="ignore"):  # the last is infinite; the format calls it no number
    POWERS = np.ldexp(np.float32(1), BYTES - BIAS)
"""2^e for each byte of a scale, `[256]`."""


def assemble_mxfp4(tensors: Tensors, *, source: str) -> dict[str, LazyTensor]:
    """Replaces the blocks and scales of each weight by the weight `[E, I, O]`, named X.

    It is dequantized in float32 when it is read.

    Raises:
      ValueError: a weight lacks its scales, or the two do not fit each other.
    """
    assembled = dict(tensors)
    for name in tensors:
        if not name.endswith(BLOCKS):
            continue
        weight = name.removesuffix(BLOCKS)
        scales = assembled.pop(f"{weight}{SCALES}", None)
        if scales is None:
            raise ValueError(f"{source}: {name} lacks its {weight}{SCALES}")
        blocks = assembled.pop(name)
        fitting = (*scales.shape, BLOCK // 2)
        if blocks.shape != fitting or len(scales.shape) != 3:
            raise ValueError(
                f"{source}: {name} has the shape {blocks.shape} and its scales {scales.shape}; "
                f"expected (experts, out, in / {BLOCK}, {BLOCK // 2}) and (experts, out, "
                f"in / {BLOCK})"
            )
        assembled[weight] = _dequantizing(blocks, scales)
    return assembled


def _dequantizing(blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """The weight `[E, I, O]` whose blocks and scales these are."""
    experts, outs, blocks_of_row = scales.shape
    shape = (experts, blocks_of_row * BLOCK, outs)

    def read(index: Index) -> np.ndarray:
        # An index may name the first axes only.
        unnamed = [slice(None)] * (3 - len(index))
        of_experts, of_ins, of_outs = (*index, *unnamed)
        # The stored axes are E, O, I: experts and outputs are sliced before they are dequantized.
        rows = (of_experts, of_outs)
        values = dequantized(blocks.read(rows), scales.read(rows))
        values = values[:, :, of_ins]
        return values.swapaxes(1, 2)

    return LazyTensor(shape, read)


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 values `[..., I]` of blocks `[..., I / 32, 16]` and scales `[..., I / 32]`."""
    pairs = PAIRS[blocks]  # [..., I / 32, 16, 2]
    values = pairs.reshape(*scales.shape, BLOCK)
    powers = POWERS[scales]
    values *= powers[..., None]
    *leading, _ = scales.shape
    return values.reshape(*leading, -1)
