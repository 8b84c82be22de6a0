"""A native CPU program: buffers, weights and operations recorded once, then run for every step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kt_async.ffi import structs
from kt_async.ffi.lib import check, load
from kt_async.ffi.pool import Pool


class TensorLike(Protocol):
    """What a tensor's description must have; `weights.source.TensorInfo` does."""

    @property
    def type(self) -> int:
        """The ggml type number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major: [experts, rows, cols], [rows, cols] or [n]."""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""


_GGML_F32 = 0


def _filled(count: int, values: Sequence[int], rest: int) -> list[int]:
    return [*values, *([rest] * (count - len(values)))]


class CpuModel:
    """Owner of one kt_model. [setup] for everything but run and read, which are [engine].

    The pool must outlive it; so must the memory of weights added as KT_WEIGHT_BORROW. Every method
    raises NativeError with the native library's sentence.
    """

    def __init__(self, pool: Pool, config: structs.ModelConfig) -> None:
        handle = ctypes.c_void_p()
        check(load().kt_model_create(ctypes.byref(config), pool.handle, ctypes.byref(handle)))
        self._handle = handle
        self._pool = pool
        self._widths: list[int] = []
        self._run = load().kt_model_run
        self._stats = structs.sized(structs.ModelStats)

    def add_buffer(self, width: int, by_sample: bool) -> int:
        """A f32 buffer [T or S, width]; returns its id."""
        buffer_id = ctypes.c_int32()
        check(
            load().kt_model_add_buffer(self._handle, width, int(by_sample), ctypes.byref(buffer_id))
        )
        self._widths.append(width)
        return buffer_id.value

    def add_weight(self, info: TensorLike, address: int, kind: int) -> int:
        """Pack (or borrow) the tensor at `address`, GGUF order; returns its id. kind: KT_WEIGHT_x."""
        tensor = structs.tensor_at(info.type, info.shape, info.num_bytes, address)
        return self._add(tensor, kind)

    def add_vector(self, values: npt.NDArray[np.float32]) -> int:
        """A small f32 array that is in no file; copied."""
        tensor = structs.tensor_at(_GGML_F32, values.shape, values.nbytes, values.ctypes.data)
        return self._add(tensor, structs.KT_WEIGHT_VECTOR)

    def _add(self, tensor: structs.Tensor, kind: int) -> int:
        weight_id = ctypes.c_int32()
        check(
            load().kt_model_add_weight(
                self._handle, ctypes.byref(tensor), kind, ctypes.byref(weight_id)
            )
        )
        return weight_id.value

    def add_op(
        self,
        code: int,
        *,
        inputs: Sequence[int] = (),
        outputs: Sequence[int] = (),
        weights: Sequence[int] = (),
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:
        """Record one operation (KT_OP_x); operands as described there, -1 where one is absent."""
        op = structs.sized(structs.Op, code=code)
        for name, values, rest in (
            ("in", inputs, -1),
            ("out", outputs, -1),
            ("w", weights, -1),
            ("i", ints, 0),
        ):
            array = getattr(op, name)
            array[:] = _filled(len(array), values, rest)
        op.f[: len(floats)] = list(floats)
        check(load().kt_model_add_op(self._handle, ctypes.byref(op)))

    def finish(self, logits_buffer: int) -> None:
        """Name the logits buffer [S, V] and allocate everything."""
        check(load().kt_model_finish(self._handle, logits_buffer))

    def run(
        self,
        plan: structs.Plan,
        layout: structs.BlockLayout,
        block_address: int,
        out: structs.SampleOut,
    ) -> None:
        """Run one step and sample into the arrays `out` points at; blocks without the GIL."""
        status = self._run(
            self._handle,
            ctypes.byref(plan),
            ctypes.byref(layout),
            block_address,
            ctypes.byref(out),
        )
        check(status)

    def read(self, buffer_id: int, first: int, count: int) -> npt.NDArray[np.float32]:
        """Rows [first, first + count) of a buffer after a run: f32 [count, width]."""
        width = self._widths[buffer_id] if 0 <= buffer_id < len(self._widths) else 0
        out = np.empty((count, width), np.float32)
        check(load().kt_model_read(self._handle, buffer_id, first, count, out.ctypes.data))
        return out

    def stats(self) -> dict[str, float]:
        """Counters since creation: bytes of weights, KV and buffers; steps; nanoseconds by kind."""
        check(load().kt_model_query(self._handle, ctypes.byref(self._stats)))
        return {
            name: getattr(self._stats, name)
            for name, *_ in structs.ModelStats._fields_
            if name != "struct_size"
        }

    def close(self) -> None:
        """Free the program and its weights. Idempotent; the pool stays."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        check(load().kt_model_destroy(handle))
