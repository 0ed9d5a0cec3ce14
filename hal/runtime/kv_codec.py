"""Keys and values as 8- or 4-bit codes with one scale for each head and token, in NumPy.

The same arithmetic as in a build (:mod:`hal.passes.cache_layout`): the largest magnitude among a
head's channels becomes code 127 or 7. Four-bit codes are raised by 8 and stored two in a byte,
channel ``c`` in the low and channel ``c + C/2`` in the high nibble.
"""

from __future__ import annotations

import numpy as np

TOP = {8: 127.0, 4: 7.0}
"""The largest code of each width."""

_TINY = np.float32(1e-20)


def encode(array: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes (int8, or uint8 for two of 4 bits) and float32 scales ``[..., 1]`` of ``[..., C]``."""
    if not bits:
        return array, None
    top = np.float32(TOP[bits])
    scale = np.maximum(np.abs(array).max(-1, keepdims=True), _TINY) / top
    codes = np.round(array / scale)
    if bits == 8:
        return codes.astype(np.int8), scale
    half = array.shape[-1] // 2
    raised = (codes + 8).astype(np.uint8)
    return raised[..., :half] | (raised[..., half:] << np.uint8(4)), scale


def decode(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Float32 ``[..., C]`` from what :func:`encode` gave."""
    if bits == 4:
        both = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
        return (both.astype(np.float32) - 8) * scale
    return codes.astype(np.float32) * scale
