"""Small numpy encoders for the GGUF types that the gguf package can only decode.

Plain min/max scales, no search: good enough to make test checkpoints, and checked against
gguf.quants.dequantize. Block layouts follow ggml's ggml-common.h; weights are x[block, weight].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# The 16 levels of IQ4_NL and IQ4_XS.
_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def quantize(values: Floats, type_name: str) -> Bytes:
    """Encode [..., cols] float32 as GGUF blocks, uint8 [..., bytes per row].

    Raises KeyError for a type without an encoder.
    """
    if type_name == "F32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    if type_name == "F16":
        return values.astype("<f2").view(np.uint8)
    if type_name in _ENCODERS:
        block, encode = _ENCODERS[type_name]
        blocks = encode(np.ascontiguousarray(values, np.float32).reshape(-1, block))
        return blocks.reshape(*values.shape[:-1], -1)
    return np.asarray(quants.quantize(values, GGMLQuantizationType[type_name]))


def dequantize(data: Bytes, type_name: str, shape: tuple[int, ...]) -> Floats:
    """Decode GGUF bytes exactly, by the gguf package."""
    if type_name == "F32":
        return data.view("<f4").reshape(shape)
    rows = data.reshape(-1, data.size // int(np.prod(shape[:-1], dtype=np.int64)))
    return np.asarray(quants.dequantize(rows, GGMLQuantizationType[type_name])).reshape(shape)


def _half(values: Floats) -> tuple[Bytes, Floats]:
    """Return values as f16 bytes [..., 2] and as the float32 they became."""
    halves = values.astype("<f2")
    return halves[..., None].view(np.uint8), halves.astype(np.float32)


def _divide(values: Floats, scale: Floats) -> Floats:
    """Divide, with 0 for a zero scale."""
    return np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)


def _round(values: Floats, low: int, high: int) -> npt.NDArray[np.int32]:
    return np.clip(np.rint(values), low, high).astype(np.int32)


def _scale_and_min(
    x: Floats, size: int, levels: int, scale_bits: int
) -> tuple[Bytes, Bytes, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Fit x = d * sc * q - dmin * m per sub-block of `size` weights, q in 0..levels.

    Returns d and dmin bytes, then sc, m [blocks, subs] and q [blocks, subs, size].
    """
    sub = x.reshape(len(x), -1, size)
    low = np.minimum(sub.min(2), 0)
    step = (sub.max(2) - low) / np.float32(levels)
    top = (1 << scale_bits) - 1
    d_raw, d = _half(step.max(1) / np.float32(top))
    m_raw, dmin = _half(-low.min(1) / np.float32(top))
    sc = _round(_divide(step, d[:, None] * np.ones_like(step)), 0, top)
    m = _round(_divide(-low, dmin[:, None] * np.ones_like(low)), 0, top)
    scale = (d[:, None] * sc)[..., None] * np.ones_like(sub)
    q = _round(_divide(sub + (dmin[:, None] * m)[..., None], scale), 0, levels)
    return d_raw, m_raw, sc, m, q


def _signed_scale(
    x: Floats, size: int, levels: int, scale_top: int
) -> tuple[Bytes, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Fit x = d * sc * q per sub-block, q in -levels..levels - 1, sc in -scale_top - 1..scale_top.

    Returns d bytes, sc [blocks, subs] and q [blocks, subs, size].
    """
    sub = x.reshape(len(x), -1, size)
    # The value of the largest magnitude gets -levels, the end of the range that reaches further.
    peak = np.take_along_axis(sub, np.abs(sub).argmax(2)[..., None], 2)[..., 0]
    step = peak / np.float32(-levels)
    d_raw, d = _half(np.abs(step).max(1) / np.float32(scale_top))
    sc = _round(_divide(step, d[:, None] * np.ones_like(step)), -scale_top - 1, scale_top)
    scale = (d[:, None] * sc)[..., None] * np.ones_like(sub)
    return d_raw, sc, _round(_divide(sub, scale), -levels, levels - 1)


def _pack_scales_k4(sc: npt.NDArray[np.int32], m: npt.NDArray[np.int32]) -> Bytes:
    """Pack eight 6-bit scales and eight 6-bit minima into 12 bytes."""
    out = np.zeros((len(sc), 12), np.int32)
    out[:, 0:4] = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    out[:, 4:8] = m[:, :4] | (m[:, 4:] >> 4) << 6
    out[:, 8:12] = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return out.astype(np.uint8)


def _nibbles(q: npt.NDArray[np.int32]) -> Bytes:
    """Pack sub-blocks 2j (low) and 2j + 1 (high): [blocks, 8, 32] -> [blocks, 128]."""
    return (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8).reshape(len(q), 128)


def _crumbs(q: npt.NDArray[np.int32]) -> Bytes:
    """Pack 2-bit values: within each half, byte l holds weights l, l + 32, l + 64, l + 96."""
    part = q.reshape(-1, 2, 4, 32)
    packed = part[:, :, 0] | part[:, :, 1] << 2 | part[:, :, 2] << 4 | part[:, :, 3] << 6
    return packed.astype(np.uint8).reshape(len(part), 64)


def _q2_k(x: Floats) -> Bytes:
    d, dmin, sc, m, q = _scale_and_min(x, 16, 3, 4)
    return np.concatenate([(sc | m << 4).astype(np.uint8), _crumbs(q), d, dmin], 1)


def _q3_k(x: Floats) -> Bytes:
    d, sc, q = _signed_scale(x, 16, 4, 31)
    q = q.reshape(-1, 8, 32) + 4
    mask = sum((q[:, bit] >> 2) << bit for bit in range(8))
    packed = np.zeros((len(x), 12), np.int32)
    sc = sc + 32
    packed[:, :8] = sc[:, :8] & 15 | (sc[:, 8:] & 15) << 4
    for group in range(4):
        packed[:, 8:] |= (sc[:, 4 * group : 4 * group + 4] >> 4) << 2 * group
    high = np.asarray(mask).astype(np.uint8)
    return np.concatenate([high, _crumbs(q & 3), packed.astype(np.uint8), d], 1)


def _q4_k(x: Floats) -> Bytes:
    d, dmin, sc, m, q = _scale_and_min(x, 32, 15, 6)
    return np.concatenate([d, dmin, _pack_scales_k4(sc, m), _nibbles(q)], 1)


def _q5_k(x: Floats) -> Bytes:
    d, dmin, sc, m, q = _scale_and_min(x, 32, 31, 6)
    high = np.asarray(sum((q[:, sub] >> 4) << sub for sub in range(8))).astype(np.uint8)
    return np.concatenate([d, dmin, _pack_scales_k4(sc, m), high, _nibbles(q & 15)], 1)


def _q6_k(x: Floats) -> Bytes:
    d, sc, q = _signed_scale(x, 16, 32, 127)
    part = q.reshape(-1, 2, 4, 32) + 32
    low = np.concatenate(
        [
            part[:, :, 0] & 15 | (part[:, :, 2] & 15) << 4,
            part[:, :, 1] & 15 | (part[:, :, 3] & 15) << 4,
        ],
        2,
    )
    high = sum((part[:, :, i] >> 4) << 2 * i for i in range(4))
    parts = [
        low.astype(np.uint8).reshape(len(x), 128),
        np.asarray(high).astype(np.uint8).reshape(len(x), 64),
        sc.astype(np.int8).view(np.uint8),
        d,
    ]
    return np.concatenate(parts, 1)


def _nearest_level(values: Floats) -> npt.NDArray[np.int32]:
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.int32)


def _halves(q: npt.NDArray[np.int32]) -> Bytes:
    """Pack 32 values into 16 bytes: byte l holds l and l + 16."""
    return (q[..., :16] | q[..., 16:] << 4).astype(np.uint8)


def _iq4_nl(x: Floats) -> Bytes:
    raw, d = _half(np.abs(x).max(1) / np.float32(127))
    return np.concatenate([raw, _halves(_nearest_level(_divide(x, d[:, None] + 0 * x)))], 1)


def _iq4_xs(x: Floats) -> Bytes:
    sub = x.reshape(-1, 8, 32)
    step = np.abs(sub).max(2) / np.float32(127)
    raw, d = _half(step.max(1) / np.float32(31))
    sc = _round(_divide(step, d[:, None] + 0 * step), 0, 31)
    scale = (d[:, None] * sc)[..., None] + 0 * sub
    q = _nearest_level(_divide(sub, scale))
    ls = sc + 32
    low = (ls[:, 0::2] & 15 | (ls[:, 1::2] & 15) << 4).astype(np.uint8)
    high = np.asarray(sum((ls[:, i] >> 4) << 2 * i for i in range(8))).astype("<u2")
    return np.concatenate([raw, high[:, None].view(np.uint8), low, _halves(q).reshape(-1, 128)], 1)


_ENCODERS: dict[str, tuple[int, Callable[[Floats], Bytes]]] = {
    "Q2_K": (256, _q2_k),
    "Q3_K": (256, _q3_k),
    "Q4_K": (256, _q4_k),
    "Q5_K": (256, _q5_k),
    "Q6_K": (256, _q6_k),
    "IQ4_NL": (32, _iq4_nl),
    "IQ4_XS": (256, _iq4_xs),
}
