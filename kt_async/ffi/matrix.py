"""Tensor types and single packed matrices of the native library: for tests, loaders, benchmarks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kt_async.errors import NativeError
from kt_async.ffi import lib, structs

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

GENERIC = 1  # TypeInfo.has_kernel: runs, but without a fast layout
FAST = 2


class PoolHandle(Protocol):
    """A worker pool: anything that carries the kt_pool pointer."""

    @property
    def handle(self) -> ctypes.c_void_p:
        """The kt_pool pointer."""


@dataclass(frozen=True)
class TypeInfo:
    """A tensor type: block_size weights take block_bytes bytes."""

    type: int
    name: str
    block_size: int
    block_bytes: int
    has_kernel: int

    def num_bytes(self, num_weights: int) -> int:
        """Bytes of num_weights weights (a multiple of block_size)."""
        return num_weights // self.block_size * self.block_bytes


def type_info(ggml_type: int) -> TypeInfo:
    """Describe a ggml type number. Raises NativeError (KT_ERR_UNSUPPORTED) when it is unknown."""
    info = structs.sized(structs.TypeInfo)
    lib.check(lib.load().kt_type_query(ggml_type, ctypes.byref(info)))
    return TypeInfo(
        info.type, info.name.decode(), info.block_size, info.block_bytes, info.has_kernel
    )


def dequantize(ggml_type: int, data: npt.NDArray[np.generic]) -> F32Array:
    """Decode GGUF bytes to a flat f32 array, bit for bit as gguf.quants.dequantize does."""
    info = type_info(ggml_type)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if raw.size % info.block_bytes:
        raise NativeError(
            structs.KT_ERR_ARGUMENT,
            f"{raw.size} bytes are not a whole number of {info.name} blocks of {info.block_bytes}",
        )
    out = np.empty(raw.size // info.block_bytes * info.block_size, np.float32)
    lib.check(lib.load().kt_dequantize(ggml_type, raw.ctypes.data, out.size, out.ctypes.data))
    return out


def peak_rate(pool: PoolHandle, kind: int) -> float | None:
    """Multiply-adds per second of all workers; None when the ISA has no such instruction.

    kind: 0 integer, 1 bf16, 2 f32.
    """
    result = ctypes.c_double()
    status = lib.load().kt_bench_peak(pool.handle, kind, ctypes.byref(result))
    if status == structs.KT_ERR_UNSUPPORTED:
        return None
    lib.check(status)
    return result.value


class Matrix:
    """Packed weights of one tensor [num_experts, rows, cols]. Free with close() or `with`.

    data: the tensor's GGUF bytes, read during the call only. Raises NativeError when type, shape
    and size disagree.
    """

    def __init__(
        self,
        pool: PoolHandle,
        ggml_type: int,
        data: npt.NDArray[np.generic],
        rows: int,
        cols: int,
        num_experts: int = 1,
    ) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        shape = (num_experts, rows, cols)
        tensor = structs.tensor_at(ggml_type, shape, raw.size, raw.ctypes.data)
        self.rows, self.cols, self.num_experts = rows, cols, num_experts
        self.num_bytes = raw.size
        self._pool = pool  # must outlive the handle
        self.handle = ctypes.c_void_p()
        lib.check(
            lib.load().kt_matrix_create(
                pool.handle, ctypes.byref(tensor), ctypes.byref(self.handle)
            )
        )

    def unpack(self) -> U8Array:
        """Return the GGUF bytes, flat."""
        out = np.empty(self.num_bytes, np.uint8)
        lib.check(lib.load().kt_matrix_unpack(self.handle, out.ctypes.data, out.size))
        return out

    def multiply(
        self, x: F32Array, expert: int = 0, out: F32Array | None = None, *, is_prompt: bool = False
    ) -> F32Array:
        """Return x . W[expert]^T: x f32 [m, cols] -> f32 [m, rows].

        is_prompt: multiply like prompt tokens (bf16 where the CPU has AMX).
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self.cols:
            raise NativeError(
                structs.KT_ERR_ARGUMENT, f"x has shape {x.shape}, expected [m, {self.cols}]"
            )
        if out is None:
            out = np.empty((x.shape[0], self.rows), np.float32)
        lib.check(
            lib.load().kt_matrix_multiply(
                self.handle, expert, x.ctypes.data, x.shape[0], out.ctypes.data, int(is_prompt)
            )
        )
        return out

    def close(self) -> None:
        """Free the weights; the object is unusable afterwards."""
        lib.load().kt_matrix_destroy(self.handle)
        self.handle = ctypes.c_void_p()

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
