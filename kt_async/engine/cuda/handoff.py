"""Routed experts on the CPU inside a captured decode graph: ask, own work of the GPU, take.

Protocol and mechanisms: native/src/device/handoff.h. `probe` finds out which mechanism works.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kt_async.engine.cuda.args import SignalArg
from kt_async.engine.cuda.experts import Names, VramExperts
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.values import Rows, prepared_arg
from kt_async.errors import EngineError
from kt_async.ffi import structs
from kt_async.ffi.cuda import KernelArgument
from kt_async.ffi.handoff import ExpertSet, Handoff

# Fastest first; 4, 7 and 25 us a layer for one row on an H200 (bench/handoff.py).
MECHANISMS = {
    "spin": structs.KT_HANDOFF_SPIN,
    "wait_value": structs.KT_HANDOFF_WAIT_VALUE,
    "host_call": structs.KT_HANDOFF_HOST_CALL,
}
LIMIT_TICKS = 20_000_000_000  # about ten seconds of clock64
_SIGNAL_BLOCKS = 16
_BLOCK = 256
_NORM_THREADS = 1024
_WARP = 32

_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_PTR = ctypes.c_void_p
# name, grid, arguments: puts a kernel on the current stream.
Launch = Callable[[str, tuple[int, int], Sequence[KernelArgument]], None]


@dataclass(slots=True)
class HandoffBuffers:
    """Pinned memory between the graph and the CPU; one set serves all layers, which run in turn.

    request and done hold one flag per layer, 64 bytes apart.
    """

    x: torch.Tensor  # f32 [rows, H]
    ids: torch.Tensor  # int32 [rows, K]
    weights: torch.Tensor  # f32 [rows, K]
    out: torch.Tensor  # f32 [rows, H]
    request: torch.Tensor  # int32 [layers, 16]
    done: torch.Tensor  # int32 [layers, 16]
    # Device int32 [layers, 4]: blocks that arrived; struct Waiting of step.cu; a flag nobody reads.
    counters: torch.Tensor
    error: torch.Tensor  # pinned int32 [1]: 2 = the CPU failed, 3 = it did not answer

    @staticmethod
    def allocate(layers: int, rows: int, hidden: int, top_k: int) -> HandoffBuffers:
        def pinned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

        return HandoffBuffers(
            x=pinned(rows, hidden, dtype=torch.float32),
            ids=pinned(rows, top_k, dtype=torch.int32),
            weights=pinned(rows, top_k, dtype=torch.float32),
            out=pinned(rows, hidden, dtype=torch.float32),
            request=pinned(layers, 16, dtype=torch.int32),
            done=pinned(layers, 16, dtype=torch.int32),
            counters=torch.zeros((layers, 4), dtype=torch.int32, device="cuda"),
            error=pinned(1, dtype=torch.int32),
        )


@dataclass(slots=True)
class Channel:
    """Buffers, the native side that answers, and how the two meet."""

    buffers: HandoffBuffers
    native: Handoff
    mechanism: int  # KT_HANDOFF_x
    limit_ticks: int = LIMIT_TICKS  # of clock64, after which a silent CPU is an error

    @staticmethod
    def open(
        mechanism: str,
        experts: ExpertSet | None,
        shape: tuple[int, int, int, int],
        limit_ticks: int = LIMIT_TICKS,
    ) -> Channel:
        """shape: layers, rows, hidden size, top_k. experts None: requests are answered at once."""
        buffers = HandoffBuffers.allocate(*shape)
        config = structs.sized(
            structs.HandoffConfig,
            num_layers=shape[0],
            max_tokens=shape[1],
            mechanism=MECHANISMS[mechanism],
            x=buffers.x.data_ptr(),
            ids=buffers.ids.data_ptr(),
            weights=buffers.weights.data_ptr(),
            out=buffers.out.data_ptr(),
            request=buffers.request.data_ptr(),
            done=buffers.done.data_ptr(),
        )
        return Channel(buffers, Handoff(config, experts), MECHANISMS[mechanism], limit_ticks)

    def ask(
        self,
        launch: Launch,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Hand x f32 [T, H], ids and weights [T, K] of a layer to the CPU."""
        b = self.buffers
        launch(
            "handoff_signal",
            (_blocks(x.numel()), 1),
            [
                _PTR(x.data_ptr()),
                _PTR(ids.data_ptr()),
                _PTR(weights.data_ptr()),
                _I32(x.numel()),
                _I32(ids.numel()),
                _PTR(b.x.data_ptr()),
                _PTR(b.ids.data_ptr()),
                _PTR(b.weights.data_ptr()),
                _PTR(self._request(layer).data_ptr()),
                _PTR(b.counters[layer].data_ptr()),
            ],
        )

    def take(self, launch: Launch, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """Wait for the CPU; residual + its result, f32 [T, H]."""
        out = torch.empty_like(residual)
        self.take_into(launch, layer, residual, out)
        return out

    def take_into(
        self, launch: Launch, layer: int, residual: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The same into `out`."""
        b = self.buffers
        self.wait_in_graph(layer)
        launch(
            "handoff_wait",
            (_blocks(residual.numel()), 1),
            [
                _PTR(b.out.data_ptr()),
                _PTR(residual.data_ptr()),
                _I32(residual.numel()),
                _PTR(b.done[layer].data_ptr()),
                _PTR(b.counters[layer, 1:].data_ptr()),
                _PTR(b.error.data_ptr()),
                _I64(self.limit_ticks),
                _PTR(out.data_ptr()),
            ],
        )

    def signal(self, layer: int) -> SignalArg:
        """For a router kernel that asks by itself."""
        b = self.buffers
        return SignalArg(
            b.x.data_ptr(),
            b.ids.data_ptr(),
            b.weights.data_ptr(),
            self._request(layer).data_ptr(),
        )

    def check(self) -> None:
        """Raise EngineError when a replay ended without the CPU's answer."""
        state = int(self.buffers.error[0])
        if state:
            reason = "failed" if state == 2 else "did not answer in time"
            raise EngineError(f"the CPU experts {reason} in a decode step (state {state})")

    def _request(self, layer: int) -> torch.Tensor:
        """The flag that a kernel raises. A host function is called in stream order: it needs none."""
        if self.mechanism == structs.KT_HANDOFF_HOST_CALL:
            return self.buffers.counters[layer, 3:]
        return self.buffers.request[layer]

    def wait_in_graph(self, layer: int) -> None:
        """Captured between ask and take; a spinning kernel needs nothing."""
        if self.mechanism != structs.KT_HANDOFF_SPIN:
            self.native.wait_in_graph(layer, torch.cuda.current_stream().cuda_stream)


def _blocks(count: int) -> int:
    return min(_SIGNAL_BLOCKS, -(-count // (4 * _BLOCK)))


@dataclass(slots=True)
class HandoffExperts:
    """The CPU computes the experts while the graph goes on, then waits."""

    channel: Channel
    layer_of: Mapping[str, int]  # gate tensor name -> index among the layers on the CPU
    vram: VramExperts  # computes the layers that are not in layer_of

    def __call__(
        self,
        ops: CudaOps,
        x: Rows,
        residual: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        names: Names,
    ) -> torch.Tensor | Rows:
        if names[0] not in self.layer_of:
            return self.vram(ops, x, residual, ids, weights, names)
        self.ask(ops, x, ids, weights, names)
        return self.take(ops, residual, names)

    def overlaps(self, names: Names) -> bool:
        """Whether the GPU has time of its own between ask and take."""
        return names[0] in self.layer_of

    def ask(
        self, ops: CudaOps, x: Rows, ids: torch.Tensor, weights: torch.Tensor, names: Names
    ) -> None:
        """Hand the layer's rows over."""
        assert x.f32 is not None
        self.channel.ask(ops.launch, self.layer_of[names[0]], x.f32, ids, weights)

    def signal(self, names: Names) -> SignalArg:
        """Where the router puts the rows."""
        return self.channel.signal(self.layer_of[names[0]])

    def take(self, ops: CudaOps, residual: torch.Tensor, names: Names) -> Rows:
        """residual + the experts' outputs, waited for by whoever needs them first."""
        waiting = CpuSum(self.channel, ops, self.layer_of[names[0]], residual)
        return Rows(torch.empty_like(residual), residual.shape[1], sum_of=waiting)

    def warm_up(self, ops: CudaOps, width: int) -> None:
        """Launch what only graphs use: a capture cannot load kernels."""
        self.channel.buffers.done[0, 0] = 1
        x = torch.zeros((1, width), device="cuda")
        spinning = replace(self.channel, mechanism=structs.KT_HANDOFF_SPIN)
        CpuSum(spinning, ops, 0, x).add_and_norm(x, x[0].clone(), 1.0, Rows(x.clone(), width))
        torch.cuda.current_stream().synchronize()


@dataclass(frozen=True, slots=True)
class CpuSum:
    """Implements values.WaitingSum for a layer of a channel."""

    channel: Channel
    ops: CudaOps
    layer: int
    residual: torch.Tensor

    def add(self, out: torch.Tensor) -> None:
        """Wait; residual + the CPU's result."""
        self.channel.take_into(self.ops.launch, self.layer, self.residual, out)

    def add_and_norm(
        self, out: torch.Tensor, weight: torch.Tensor, eps: float, normed: Rows
    ) -> None:
        """The same, and the norm that follows."""
        rows, cols = self.residual.shape
        b = self.channel.buffers
        self.channel.wait_in_graph(self.layer)
        self.ops.launch(
            "handoff_wait_norm",
            (rows, 1),
            [
                _PTR(b.out.data_ptr()),
                _PTR(self.residual.data_ptr()),
                _I32(cols),
                _PTR(b.done[self.layer].data_ptr()),
                _PTR(b.counters[self.layer, 1:].data_ptr()),
                _PTR(b.error.data_ptr()),
                _I64(self.channel.limit_ticks),
                _PTR(out.data_ptr()),
                _PTR(weight.data_ptr()),
                ctypes.c_float(eps),
                prepared_arg(normed),
            ],
            min(_NORM_THREADS, -(-cols // _WARP) * _WARP),
            4 * cols,
        )
