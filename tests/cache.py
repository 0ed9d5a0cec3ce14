"""A numpy model of the paged cache: what the cache ops mean, written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np


def write(pool: Any, update: Any, table: Any, lengths: Any) -> np.ndarray:
    """``hal::CacheWrite`` one position at a time."""
    out, page = pool.copy(), pool.shape[2]
    for b, s in np.ndindex(update.shape[0], update.shape[2]):
        at = lengths[b] + s
        out[table[b, at // page], :, at % page] = update[b, :, s]
    return out


def attend(
    q: Any, keys: Any, values: Any, table: Any, lengths: Any, *, scale: float, window: int = 0,
    softcap: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """``hal::CachedAttention`` on float pools, one query at a time, in float64."""
    batch, heads, new, _ = q.shape
    page, group = keys.shape[2], heads // keys.shape[1]
    out = np.zeros((batch, heads, new, values.shape[3]))
    for b, h, s in np.ndindex(batch, heads, new):
        last = lengths[b] + s
        seen = range(max(0, last - window + 1) if window else 0, last + 1)
        at = [(table[b, p // page], h // group, p % page) for p in seen]
        scores = np.array([np.dot(keys[i].astype(float), q[b, h, s]) for i in at]) * scale
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, h, s] = sum(w * values[i] for w, i in zip(weights, at, strict=True))
    return out


def quantized(pool: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes as stored, scales of ``block`` channels each, and the numbers that they stand for."""
    top = 127 if bits == 8 else 7
    blocks = pool.reshape(*pool.shape[:-1], -1, block)
    scale = (np.abs(blocks).max(-1) / top).astype(np.float16)
    wide = scale.astype(np.float32)[..., None]
    codes = np.clip(np.round(blocks / wide), -top, top)
    meant = (codes * wide).reshape(pool.shape)
    codes = codes.reshape(pool.shape)
    if bits == 8:
        return codes.astype(np.int8), scale, meant
    half = pool.shape[-1] // 2
    raised = (codes + 8).astype(np.uint8)
    return raised[..., :half] | raised[..., half:] << 4, scale, meant


def problem(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, channels: int = 16, new: int = 3,
    page: int = 4, pages: int = 9, blocks: int = 4, seed: int = 0, value_channels: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Random inputs of the cache ops: rows of different lengths, pages in no order."""
    rng = np.random.default_rng(seed)
    shape = (pages, kv_heads, page)
    return {
        "q": rng.standard_normal((batch, heads, new, channels), np.float32),
        "k": rng.standard_normal((batch, kv_heads, new, channels), np.float32),
        "keys": rng.standard_normal((*shape, channels), np.float32),
        "values": rng.standard_normal((*shape, value_channels or channels), np.float32),
        "table": rng.permutation(pages)[: batch * blocks].reshape(batch, blocks).astype(np.int32),
        "lengths": rng.integers(0, page * blocks - new + 1, batch),
    }
