"""One routed-expert layer by itself, for tests and benchmarks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.lib import check, load
from kt_async.ffi.matrix import Matrix

F32Array = npt.NDArray[np.float32]


def experts_multiply(
    matrices: tuple[Matrix, Matrix, Matrix],
    x: F32Array,
    ids: npt.NDArray[np.int32],
    weights: F32Array,
    out: F32Array | None = None,
    is_prompt: npt.NDArray[np.uint8] | None = None,
) -> F32Array:
    """Return sum over k of weights[t, k] * down(silu(gate x) * (up x)) for expert ids[t, k].

    matrices: gate and up [E, I, H], down [E, H, I]; x f32 [T, H]; ids int32 and weights f32 [T, K];
    is_prompt u8 [T]: tokens that are multiplied like a prompt's (None: no token).
    Raises NativeError for shapes that do not fit and ids out of range. Source: kt_experts_multiply.
    """
    gate, up, down = matrices
    x = np.ascontiguousarray(x, np.float32)
    ids = np.ascontiguousarray(ids, np.int32)
    weights = np.ascontiguousarray(weights, np.float32)
    tokens, top_k = ids.shape
    if x.shape != (tokens, gate.cols) or weights.shape != ids.shape:
        raise NativeError(
            structs.KT_ERR_ARGUMENT,
            f"x {x.shape}, ids {ids.shape} and weights {weights.shape} do not fit a gate of "
            f"{gate.cols} columns",
        )
    if is_prompt is not None and (is_prompt.shape != (tokens,) or is_prompt.dtype != np.uint8):
        raise NativeError(
            structs.KT_ERR_ARGUMENT,
            f"is_prompt is {is_prompt.dtype} {is_prompt.shape}, expected uint8 ({tokens},)",
        )
    if out is None:
        out = np.empty((tokens, down.rows), np.float32)
    check(
        load().kt_experts_multiply(
            gate.handle,
            up.handle,
            down.handle,
            x.ctypes.data,
            ids.ctypes.data,
            weights.ctypes.data,
            tokens,
            top_k,
            out.ctypes.data,
            None if is_prompt is None else np.ascontiguousarray(is_prompt).ctypes.data,
        )
    )
    return out
