"""Keys and values as 8- or 4-bit codes with a scale for each block of channels, in NumPy.

The same arithmetic as in a build (:mod:`hal.passes.cache_layout`): the largest magnitude in a block
of a head's channels at a position becomes code 127 or 7; scales are float16. Four-bit codes are
raised by 8 and stored two in a byte, channel ``c`` in the low and channel ``c + C/2`` in the high
nibble.
"""

from __future__ import annotations

import numpy as np

from hal.ir.cache_plan import SMALLEST_SCALE, TOP


def encode(array: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes (int8, or uint8 for two of 4 bits) and scales ``[..., C / block]`` of ``[..., C]``."""
    if not bits:
        return array, None
    top = np.float32(TOP[bits])
    blocks = array.reshape(*array.shape[:-1], array.shape[-1] // block, block)
    scale = np.maximum(np.abs(blocks).max(-1) / top, np.float32(SMALLEST_SCALE)).astype(np.float16)
    codes = np.round(blocks / scale.astype(np.float32)[..., None]).clip(-top, top)
    codes = codes.reshape(array.shape)
    if bits == 8:
        return codes.astype(np.int8), scale
    half = array.shape[-1] // 2
    raised = (codes + 8).astype(np.uint8)
    return raised[..., :half] | (raised[..., half:] << np.uint8(4)), scale


def decode(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Float32 ``[..., C]`` from what :func:`encode` gave."""
    if bits == 4:
        both = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
        numbers = both.astype(np.float32) - 8
    else:
        numbers = codes.astype(np.float32)
    blocks = numbers.reshape(*scale.shape, numbers.shape[-1] // scale.shape[-1])
    return (blocks * scale.astype(np.float32)[..., None]).reshape(numbers.shape)
