"""Pinned host memory: routed experts copied to two alternating device buffers, rows handed over."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.args import MatrixArg
from kt_async.engine.cuda.experts import Names
from kt_async.engine.cuda.grouped import Matrices
from kt_async.engine.cuda.values import PackedMatrix
from kt_async.ffi.copies import copy_to_device
from kt_async.ffi.handoff import ExpertSet

log = logging.getLogger(__name__)

_ALIGN = 256


@dataclass(slots=True)
class HostBuffers:
    """Pinned memory of one chunk's rows on their way to the CPU experts and back."""

    x: torch.Tensor  # f32 [T, H]
    ids: torch.Tensor  # int32 [T, K]
    weights: torch.Tensor  # f32 [T, K]
    out: torch.Tensor  # f32 [T, H]
    gpu_computes: torch.Tensor  # uint8 [E]
    flags: torch.Tensor  # int32 [3, 16]: word 0 of a line is a flag, see cpu_part.py

    @staticmethod
    def allocate(tokens: int, hidden: int, top_k: int, num_experts: int) -> HostBuffers:
        def pinned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

        return HostBuffers(
            x=pinned(tokens, hidden),
            ids=pinned(tokens, top_k, dtype=torch.int32),
            weights=pinned(tokens, top_k),
            out=pinned(tokens, hidden),
            gpu_computes=pinned(num_experts, dtype=torch.uint8),
            flags=pinned(3, 16, dtype=torch.int32),
        )


def pin_experts(experts: ExpertSet, num_layers: int) -> list[int]:
    """Register the packed experts with CUDA, so that copies run at the bus's full rate.

    Returns the addresses, which must be unregistered before the memory is freed; none when CUDA
    refuses.
    """
    runtime = torch.cuda.cudart()
    begin = time.monotonic()
    pinned: list[int] = []
    for layer in range(num_layers):
        for which in range(3):
            for part in experts.parts(layer, which):
                address, size = part.data.ctypes.data, part.data.nbytes
                status = runtime.cudaHostRegister(address, size, 0)
                if int(status) != 0:
                    log.warning("experts cannot be pinned (%s): long prompts copy slower", status)
                    for done in pinned:
                        runtime.cudaHostUnregister(done)
                    return []
                pinned.append(address)
    log.info("pinned the experts in %.1f s", time.monotonic() - begin)
    return pinned


@dataclass(frozen=True, slots=True)
class _Part:
    """One NUMA node's share of a tensor, and where expert 0 of it goes in the layer's buffer."""

    source: int  # host address
    target: int  # bytes from the start of the buffer
    num_bytes: int  # of one expert here: the distance between experts in host memory
    stride: int  # between experts in the buffer


class ExpertCopies:
    """Copies a layer's experts into one of two device buffers, each at a place of its own."""

    def __init__(
        self, cpu: ExpertSet, names: Sequence[Names], shapes: Mapping[str, MatrixArg], experts: int
    ) -> None:
        """shapes: type and shape of every expert tensor, data unset."""
        self.num_experts, self.num_layers = experts, len(names)
        self.stream = torch.cuda.Stream()
        self._names, self._shapes = names, shapes
        self._parts = [_parts(cpu, n, layer, shapes, experts) for n, layer in enumerate(names)]
        size = max(_layer_bytes(layer, shapes, experts) for layer in names)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self._free: list[torch.cuda.Event | None] = [None, None]

    def start(self, layer: int, experts: npt.NDArray[np.int64]) -> torch.cuda.Event:
        """Put copies of these experts (ascending) on the copy stream; the event follows them."""
        free = self._free[layer % 2]
        if free is not None:
            self.stream.wait_event(free)
        if len(experts):
            base = self._buffers[layer % 2].data_ptr()
            runs = _runs(experts)
            lists = [_copies(part, base, experts, runs) for part in self._parts[layer]]
            copy_to_device(self.stream.cuda_stream, np.ascontiguousarray(np.concatenate(lists)))
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return copied

    def matrices(self, layer: int) -> Matrices:
        """Gate, up and down in the layer's buffer."""
        buffer, at, found = self._buffers[layer % 2], 0, []
        for name in self._names[layer]:
            arg = MatrixArg.from_buffer_copy(self._shapes[name])
            size = self.num_experts * arg.expert_bytes
            data = buffer[at : at + size]
            arg.data = data.data_ptr()
            found.append(PackedMatrix(data, arg, self.num_experts))
            at += _aligned(size)
        gate, up, down = found
        return gate, up, down

    def release(self, layer: int) -> None:
        """The work put on the current stream so far was the last to read the layer's buffer."""
        used = torch.cuda.Event()
        used.record()
        self._free[layer % 2] = used

    def bytes_per_expert(self, layer: int) -> int:
        return sum(part.num_bytes for part in self._parts[layer])

    def kind(self, layer: int) -> tuple[object, ...]:
        """Equal for layers of equal types and shapes."""
        args = (self._shapes[name] for name in self._names[layer])
        return tuple((arg.type, arg.rows, arg.cols) for arg in args)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _layer_bytes(layer: Names, shapes: Mapping[str, MatrixArg], experts: int) -> int:
    return sum(_aligned(experts * shapes[name].expert_bytes) for name in layer)


def _parts(
    cpu: ExpertSet, number: int, layer: Names, shapes: Mapping[str, MatrixArg], experts: int
) -> list[_Part]:
    found, at = [], 0
    for which, name in enumerate(layer):
        arg = shapes[name]
        for part in cpu.parts(number, which):
            first = at + part.first_band * arg.band_bytes
            address = part.data.ctypes.data
            found.append(_Part(address, first, part.data.shape[1], arg.expert_bytes))
        at += _aligned(experts * arg.expert_bytes)
    return found


def _runs(experts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and number of each run of neighbours in a list that ascends."""
    begins = np.flatnonzero(experts[1:] != experts[:-1] + 1) + 1
    bounds = np.concatenate(([0], begins, [len(experts)]))
    return experts[bounds[:-1]], bounds[1:] - bounds[:-1]


def _copies(
    part: _Part,
    base: int,
    experts: npt.NDArray[np.int64],
    runs: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64]:
    """Rows of struct kt_copy; neighbours become one copy where nothing lies between them."""
    is_dense = part.num_bytes == part.stride
    first, count = runs if is_dense else (experts, np.ones(len(experts), np.int64))
    made = np.empty((len(first), 3), np.int64)
    made[:, 0] = base + part.target + first * part.stride
    made[:, 1] = part.source + first * part.num_bytes
    made[:, 2] = count * part.num_bytes
    return made
