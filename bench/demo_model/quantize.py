"""Encode float weights as Q8_0, Q4_K and Q6_K with a search for the best scales.

Block layouts are those of GGUF (ggml-common.h); a test decodes every type with the gguf package.
For each sub-block several roundings are tried; for each the scale (and the minimum) that give
the least weighted squared error follow in closed form, and the best candidate is kept. Large
weights count more, because they move the result of a matrix product more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]

_SLICE = 1 << 16  # blocks at a time, so that the temporaries stay small


def quantize(values: Floats, type_name: str) -> Bytes:
    """[..., cols] float32 -> uint8 [..., bytes per row]; KeyError for an unknown type."""
    if type_name == "F32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    size, encode = {"Q8_0": (32, _q8_0), "Q4_K": (256, _q4_k), "Q6_K": (256, _q6_k)}[type_name]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, size)
    parts = [encode(blocks[at : at + _SLICE]) for at in range(0, len(blocks), _SLICE)]
    return np.concatenate(parts).reshape(*values.shape[:-1], -1)


def _half(values: Floats) -> tuple[Bytes, Floats]:
    """f16 bytes [..., 2], and the float32 values that a reader will see."""
    halves = values.astype("<f2")
    return halves[..., None].view(np.uint8), halves.astype(np.float32)


def _over(a: Floats, b: Floats) -> Floats:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape, np.float32), where=b != 0)


def _q8_0(x: Floats) -> Bytes:
    raw, d = _half(np.abs(x).max(1) / np.float32(127))
    q = np.clip(np.rint(_over(x, d[:, None])), -127, 127).astype(np.int8)
    return np.concatenate([raw, q.view(np.uint8)], axis=1)


def _importance(x: Floats) -> Floats:
    return np.abs(x) + np.sqrt((x * x).mean(-1, keepdims=True))


def fit_scale_min(x: Floats, levels: int) -> tuple[Floats, Floats]:
    """Best (scale, minimum >= 0) of x ~ scale * q - minimum, q in 0..levels, along the last axis."""
    w = _importance(x)
    low = np.minimum(x.min(-1), 0)
    span = x.max(-1) - low
    sum_w, sum_x = w.sum(-1), (w * x).sum(-1)
    best = np.full(low.shape, np.inf, np.float32)
    scale, minimum = _over(span, np.float32(levels)), -low
    for shift in np.arange(-1.0, 1.01, 0.1, dtype=np.float32):
        q = np.clip(
            np.rint(_over(levels + shift, span)[..., None] * (x - low[..., None])), 0, levels
        )
        sum_q, sum_qq, sum_qx = (w * q).sum(-1), (w * q * q).sum(-1), (w * q * x).sum(-1)
        det = sum_w * sum_qq - sum_q * sum_q
        s = _over(sum_w * sum_qx - sum_x * sum_q, det)
        m = _over(sum_q * sum_qx - sum_qq * sum_x, det)
        is_low = m < 0  # the format has no positive offset: fit the scale alone
        s = np.where(is_low, _over(sum_qx, sum_qq), s)
        m = np.where(is_low, 0, m)
        error = (w * (s[..., None] * q - m[..., None] - x) ** 2).sum(-1)
        is_better = (error < best) & (s > 0)
        best = np.where(is_better, error, best)
        scale, minimum = np.where(is_better, s, scale), np.where(is_better, m, minimum)
    return scale.astype(np.float32), minimum.astype(np.float32)


def fit_scale(x: Floats, levels: int) -> Floats:
    """Best signed scale of x ~ scale * q, q in -levels..levels - 1, along the last axis."""
    w = _importance(x)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    best = np.full(peak.shape, -np.inf, np.float32)
    scale = _over(peak, np.float32(-levels))
    for shift in np.arange(-0.9, 0.91, 0.1, dtype=np.float32):
        q = np.rint(_over(-(levels + shift), peak)[..., None] * x)
        q = np.clip(q, -levels, levels - 1)
        sum_qq, sum_qx = (w * q * q).sum(-1), (w * q * x).sum(-1)
        gain = _over(sum_qx * sum_qx, sum_qq)  # error = const - gain
        is_better = gain > best
        best = np.where(is_better, gain, best)
        scale = np.where(is_better, _over(sum_qx, sum_qq), scale)
    return scale.astype(np.float32)


def _q4_k(x: Floats) -> Bytes:
    """d f16, dmin f16, 8 x (6-bit scale, 6-bit min) in 12 bytes, 256 x 4 bits."""
    sub = x.reshape(-1, 8, 32)
    scale, minimum = fit_scale_min(sub, 15)
    d_raw, d = _half(scale.max(1) / np.float32(63))
    m_raw, dmin = _half(minimum.max(1) / np.float32(63))
    sc = np.clip(np.rint(_over(scale, d[:, None])), 0, 63).astype(np.int32)
    m = np.clip(np.rint(_over(minimum, dmin[:, None])), 0, 63).astype(np.int32)
    offset = (dmin[:, None] * m)[..., None]
    q = np.rint(_over(sub + offset, (d[:, None] * sc).astype(np.float32)[..., None]))
    q = np.clip(q, 0, 15).astype(np.int32)
    packed = np.concatenate([
        sc[:, :4] | (sc[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
    ], axis=1)  # fmt: skip
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)
    return np.concatenate([d_raw, m_raw, packed.astype(np.uint8), nibbles.astype(np.uint8)], axis=1)


def _q6_k(x: Floats) -> Bytes:
    """256 x 4 low bits, 256 x 2 high bits, 16 x int8 scale, d f16."""
    sub = x.reshape(-1, 16, 16)
    scale = fit_scale(sub, 32)
    # The largest scale becomes -128, the end of int8 that reaches further.
    peak = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)[:, 0]
    d_raw, d = _half(peak / np.float32(-128))
    sc = np.clip(np.rint(_over(scale, d[:, None])), -128, 127).astype(np.int32)
    q = np.rint(_over(sub, (d[:, None] * sc).astype(np.float32)[..., None]))
    q = (np.clip(q, -32, 31) + 32).astype(np.int32).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.concatenate([
        ql.reshape(-1, 128).astype(np.uint8),
        qh.reshape(-1, 64).astype(np.uint8),
        sc.astype(np.int8).view(np.uint8),
        d_raw,
    ], axis=1)  # fmt: skip
