"""A prompt layer's experts on the CPU, beside the GPU: rows over, a flag, rows back, a flag.

The stream copies a layer's rows to pinned memory and raises `request`; the native library's threads
see it, compute, and raise `done`, for which a kernel of the stream waits. From the launch of that
kernel until its flag nothing needs this thread, its interpreter's lock or CUDA: a launch behind the
kernel may block until the GPU is idle (it loads code, or allocates), and then nobody else would end
the wait. Flags are numbers that rise from layer to layer, so that a late one never passes for the
next.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.copies import HostBuffers
from kt_async.engine.cuda.ops import CudaOps
from kt_async.errors import EngineError
from kt_async.ffi import structs
from kt_async.ffi.handoff import ExpertSet

_PTR = ctypes.c_void_p
_REQUEST, _DONE, _STATE = range(3)  # lines of HostBuffers.flags
_FAILED, _SILENT = 2, 3  # values of the state
# The CPU answers by itself, also with a failure: these end only what a stopped or broken process
# would make endless. One layer of a large model on few cores may take many seconds.
_LIMIT_TICKS = 60_000_000_000  # about 30 seconds of clock64, for the CPU's part of one layer
_ROWS_TIMEOUT_NS = 30_000_000_000


@dataclass(slots=True)
class CpuPart:
    """One layer at a time: fetch, start, wait_in_stream, join. [engine]"""

    cpu: ExpertSet
    host: HostBuffers
    trace: list[tuple[float, float]] | None = None  # when set: begin and end of each, in seconds
    _number: int = 0
    _borrowed: tuple[npt.NDArray[np.generic] | None, ...] = ()  # by the job in progress
    _times: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))

    @property
    def is_running(self) -> bool:
        """A job was started and not joined."""
        return bool(self._borrowed)

    def fetch(
        self, ops: CudaOps, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.cuda.Event:
        """Bring rows to the host and ask; the event follows the ids and weights."""
        tokens, host = len(ids), self.host
        host.ids[:tokens].copy_(ids, non_blocking=True)
        host.weights[:tokens].copy_(weights, non_blocking=True)
        known = torch.cuda.Event()
        known.record()
        host.x[:tokens].copy_(x, non_blocking=True)
        self._number = self._number % (structs.KT_EXPERT_JOB_FAILED - 1) + 1
        arguments = [_PTR(self._flag(_REQUEST)), ctypes.c_uint32(self._number)]
        ops.launch("raise_flag", (1, 1), arguments, 1)
        return known

    def start(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        is_prompt: npt.NDArray[np.uint8] | None,
        *,
        num_spared: int,
        waits: bool = True,
    ) -> None:
        """Begin with the rows fetched last; their weights are in `host`, x may be on its way.

        ids: int32 [T, K], below 0 = not the CPU's. waits False: x is there.
        """
        host = self.host
        job = structs.sized(
            structs.ExpertJob,
            layer=layer,
            num_tokens=len(ids),
            num_spared=num_spared,
            number=self._number,
            x=host.x.data_ptr(),
            ids=ids.ctypes.data,
            weights=host.weights.data_ptr(),
            is_prompt=None if is_prompt is None else is_prompt.ctypes.data,
            out=host.out.data_ptr(),
            request=self._flag(_REQUEST) if waits else None,
            done=self._flag(_DONE),
            timeout_ns=_ROWS_TIMEOUT_NS,
            times_ns=self._times.ctypes.data,
        )
        self.cpu.start(job)
        self._borrowed = (ids, is_prompt)

    def wait_in_stream(self, ops: CudaOps) -> None:
        """What follows on the stream begins after the CPU's answer."""
        arguments = [
            _PTR(self._flag(_DONE)),
            _PTR(self._flag(_STATE)),
            ctypes.c_uint32(self._number),
            ctypes.c_int64(_LIMIT_TICKS),
        ]
        ops.launch("wait_for_host", (1, 1), arguments, 1)

    def join(self) -> None:
        """Sleep until the CPU has finished, if it was started. Raises NativeError."""
        if self.is_running:
            try:
                self.cpu.join()
            finally:
                self._borrowed = ()  # not before: the job reads them
            if self.trace is not None:
                self.trace.append((self._times[0] * 1e-9, self._times[1] * 1e-9))

    def run(
        self,
        layer: int,
        ids: npt.NDArray[np.int32],
        is_prompt: npt.NDArray[np.uint8] | None,
        *,
        num_spared: int,
    ) -> float:
        """Rows that are in `host` already, to the end; seconds in which the workers had work."""
        self._number = self._number % (structs.KT_EXPERT_JOB_FAILED - 1) + 1
        self.start(layer, ids, is_prompt, num_spared=num_spared, waits=False)
        self.join()
        return float(self._times[1] - self._times[0]) * 1e-9

    def check(self) -> None:
        """Call after the step, all of whose kernels have ended. Raises EngineError."""
        state = int(self.host.flags[_STATE, 0])
        self.host.flags[_STATE, 0] = 0
        if state == _SILENT:
            raise EngineError(
                "the CPU took more than half a minute for its experts of one layer of a prompt: "
                "give the server cores that nothing else uses, or lower --chunk_size"
            )
        if state:
            raise EngineError(f"the CPU experts failed in a prompt step (state {state})")

    def _flag(self, line: int) -> int:
        return self.host.flags.data_ptr() + line * self.host.flags.stride(0) * 4
