"""The pinned worker pool that runs every native CPU kernel."""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Self

from kt_async.ffi import structs
from kt_async.ffi.lib import check, load


class Pool:
    """Worker threads; the calling thread is one of them. Close after everything that uses it."""

    def __init__(
        self,
        num_threads: int = 0,
        *,
        isa: int = structs.KT_ISA_AUTO,
        spin_us: int = -1,
        pin: bool = True,
        fake_nodes: int = 0,
    ) -> None:
        """num_threads: 0 = physical cores within the CPU quota. isa: KT_ISA_x.

        Raises NativeError: an option out of range, an instruction set this machine lacks.
        """
        config = structs.sized(
            structs.PoolConfig,
            num_threads=num_threads,
            isa=isa,
            spin_us=spin_us,
            pin=int(pin),
            fake_nodes=fake_nodes,
        )
        handle = ctypes.c_void_p()
        check(load().kt_pool_create(ctypes.byref(config), ctypes.byref(handle)))
        self._handle = handle

    @property
    def handle(self) -> ctypes.c_void_p:
        """The native handle, for the other modules of this package."""
        return self._handle

    def caller_cpu(self) -> int:
        """The core that no worker is pinned to; -1 when workers are not pinned."""
        cpu = ctypes.c_int32()
        check(load().kt_pool_caller_cpu(self._handle, ctypes.byref(cpu)))
        return cpu.value

    def describe(self) -> str:
        """One line: threads, nodes, instruction set, cores."""
        text = ctypes.create_string_buffer(4096)
        check(load().kt_pool_describe(self._handle, text, len(text)))
        return text.value.decode()

    def read_bandwidth(self, num_bytes: int = 1 << 28, passes: int = 5) -> float:
        """Sustained bytes per second of all workers reading `num_bytes` of fresh memory."""
        result = ctypes.c_double()
        check(load().kt_bench_read(self._handle, num_bytes, passes, ctypes.byref(result)))
        return result.value

    def close(self) -> None:
        """Join the threads. Idempotent."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        check(load().kt_pool_destroy(handle))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
