"""Random tensors of every GGUF type, with scales of a sensible size, from a seed."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T
from gguf import quants

# Byte offsets of the f16 fields of a block; everything else may be random bits.
_HALVES: dict[T, tuple[int, ...]] = {
    T.Q4_0: (0,),
    T.Q4_1: (0, 2),
    T.Q5_0: (0,),
    T.Q5_1: (0, 2),
    T.Q8_0: (0,),
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.IQ2_XXS: (0,),
    T.IQ2_XS: (0,),
    T.IQ2_S: (0,),
    T.IQ3_XXS: (0,),
    T.IQ3_S: (0,),
    T.IQ1_S: (0,),
    T.IQ1_M: (),
    T.IQ4_NL: (0,),
    T.IQ4_XS: (0,),
    T.TQ1_0: (52,),
    T.TQ2_0: (64,),
    T.MXFP4: (),
}
FLOATS = (T.F32, T.F16, T.BF16)
QUANTISED = tuple(_HALVES)
ALL_TYPES = FLOATS + QUANTISED
# Types with an R16 layout of their own; the others keep GGUF bytes per band.
FAST_TYPES = FLOATS + tuple(
    T[name]
    for name in [
        "Q2_K",
        "Q3_K",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
    ]
)


def block_size(kind: T) -> int:
    """Weights per block."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def random_tensor(kind: T, rows: int, cols: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """GGUF bytes of a [rows, cols] tensor, flat; weights are of order 1."""
    rng = np.random.default_rng([seed, int(kind), rows, cols])
    if kind in FLOATS:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return quants.quantize(values, kind).view(np.uint8).reshape(-1)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * cols // size, num_bytes), dtype=np.uint8)
    for offset in _HALVES[kind]:
        scale = rng.uniform(0.01, 0.1, len(blocks)) * rng.choice([-1.0, 1.0], len(blocks))
        blocks[:, offset : offset + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind is T.MXFP4:
        blocks[:, 0] = rng.integers(118, 126, len(blocks))
    if kind is T.IQ1_M:  # the f16 scale lies in the top nibbles of four words
        bits = rng.uniform(0.01, 0.1, len(blocks)).astype(np.float16).view(np.uint16)
        for i in range(4):
            nibble = (bits >> (4 * i) & 15).astype(np.uint8)
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | nibble << 4
    return blocks.reshape(-1)


def reference(kind: T, data: npt.NDArray[np.uint8], cols: int) -> npt.NDArray[np.float32]:
    """Decode with the gguf package: f32 [rows, cols]."""
    if kind is T.F32:
        return data.view(np.float32).reshape(-1, cols)
    if kind is T.F16:
        return data.view(np.float16).astype(np.float32).reshape(-1, cols)
    return quants.dequantize(data, kind).reshape(-1, cols)
