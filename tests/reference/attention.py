"""Attention with norms and rotary embedding, plainly, in numpy float64: the native op's twin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike, eps: float) -> F64:
    """Over the last axis."""
    wide = np.asarray(x, np.float64)
    result: F64 = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * np.asarray(weight)
    return result


def rope(
    x: F64, positions: npt.NDArray[np.int64], frequencies: F64, neox: bool, multiplier: float = 1.0
) -> F64:
    """Rotate the first 2 * len(frequencies) dims of x [T, heads, D]."""
    half = frequencies.size
    # The product in float32, as the reference implementations form it.
    angle = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    cos = np.cos(angle.astype(np.float64))[:, None] * multiplier
    sin = np.sin(angle.astype(np.float64))[:, None] * multiplier
    out = x.copy()
    first = slice(0, half) if neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if neox else slice(1, 2 * half, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def attention(q: F64, k: F64, v: F64, scale: float) -> F64:
    """Causal: q [T, QH, D] are the last T positions of k, v [N, KH, D]. Returns [T, QH, D]."""
    tokens, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    out = np.empty_like(q)
    for t in range(tokens):
        seen = length - tokens + t + 1
        for h in range(heads):
            scores = k[:seen, h // group] @ q[t, h] * scale
            p = np.exp(scores - scores.max())
            out[t, h] = (p / p.sum()) @ v[:seen, h // group]
    return out
