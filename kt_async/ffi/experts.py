"""One routed-expert layer by itself, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

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
    if out is None:
        out = np.empty((len(ids), matrices[2].rows), np.float32)
    bind_experts(matrices, x, ids, weights, out, is_prompt)()
    return out


def bind_experts(
    matrices: tuple[Matrix, Matrix, Matrix],
    x: F32Array,
    ids: npt.NDArray[np.int32],
    weights: F32Array,
    out: F32Array,
    is_prompt: npt.NDArray[np.uint8] | None = None,
) -> Callable[[], None]:
    """Check and look up everything; each call of the result multiplies into out.

    For timing: a call costs a microsecond beside the layer. Arguments as for experts_multiply;
    what is contiguous and of the right type is read when the result is called, else a copy is.
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
    if is_prompt is not None:
        is_prompt = np.ascontiguousarray(is_prompt)
    function = load().kt_experts_multiply
    arguments = (
        gate.handle,
        up.handle,
        down.handle,
        x.ctypes.data,
        ids.ctypes.data,
        weights.ctypes.data,
        tokens,
        top_k,
        out.ctypes.data,
        None if is_prompt is None else is_prompt.ctypes.data,
    )

    def call(_alive: object = (x, ids, weights, out, is_prompt)) -> None:
        check(function(*arguments))

    return call
