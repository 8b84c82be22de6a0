"""Copies from host memory to a GPU in one call."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from kt_async.ffi.lib import check, load


def copy_to_device(stream: int, copies: npt.NDArray[np.int64]) -> None:
    """Put copies on a stream, in order. copies: C-contiguous [n, 3] of struct kt_copy. [engine]

    Raises NativeError when CUDA refuses one or no CUDA runtime is loaded.
    """
    assert copies.flags.c_contiguous
    check(load().kt_copy_to_device(ctypes.c_void_p(stream), copies.ctypes.data, len(copies)))
