"""Routed experts that lie in host memory, for prefill: copied to the GPU, or left to the CPU.

Decode graphs hand theirs over instead (cuda_handoff); the runner picks one per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from kt_async.engine.cuda_args import MatrixArg
from kt_async.engine.cuda_experts import Names, VramExperts, grouped_multiply
from kt_async.engine.cuda_ops import CudaOps
from kt_async.engine.cuda_values import PackedMatrix, Rows
from kt_async.ffi.handoff import ExpertSet


@dataclass(slots=True)
class StreamedExperts:
    """Experts of long chunks: copied over PCIe layer by layer, or left to the CPU when few rows.

    Two device buffers alternate, so that the next layer's copy runs beside this layer's work.
    copy_cost_rows: below this many rows the CPU computes the layer sooner than it can be copied.
    """

    cpu: ExpertSet
    layer_of: Mapping[str, int]
    shapes: Mapping[str, MatrixArg]  # tensor name -> type and shape, data unset
    num_experts: int
    copy_cost_rows: int
    stream: torch.cuda.Stream
    vram: VramExperts  # computes the layers that are not in layer_of
    buffers: list[torch.Tensor] = field(default_factory=list)
    _ready: dict[int, tuple[list[torch.Tensor], torch.cuda.Event]] = field(default_factory=dict)
    _free: list[torch.cuda.Event | None] = field(default_factory=lambda: [None, None])
    _names: list[Names] = field(default_factory=list)
    _streams: bool = False
    _host: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = field(default_factory=dict)

    def begin_step(self, rows: int, names: list[Names]) -> None:
        """Called before a forward: forgets copies of the last step and starts the first one."""
        self._ready.clear()
        self._names = [layer for layer in names if layer[0] in self.layer_of]
        self._streams = rows >= self.copy_cost_rows
        if self._streams:
            self._start_copy(0)

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
        layer = self.layer_of[names[0]]
        if not self._streams:
            return residual + self._on_cpu(layer, x, ids, weights)
        tensors, copied = self._ready.pop(layer)
        if layer + 1 < len(self._names):
            self._start_copy(layer + 1)
        torch.cuda.current_stream().wait_event(copied)
        matrices = tuple(
            self._matrix(name, data) for name, data in zip(names, tensors, strict=True)
        )
        out = grouped_multiply(ops, x, residual, ids, weights, matrices)  # type: ignore[arg-type]
        used = torch.cuda.Event()
        used.record()
        self._free[layer % 2] = used
        return out

    def _on_cpu(
        self, layer: int, x: Rows, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert x.f32 is not None
        host_x = x.f32.cpu().numpy()
        out = np.empty_like(host_x)
        is_prompt = np.ones(len(host_x), np.uint8)
        self.cpu.run(layer, host_x, ids.cpu().numpy(), weights.cpu().numpy(), out, is_prompt)
        return torch.from_numpy(out).cuda()

    def _start_copy(self, layer: int) -> None:
        buffer = self.buffers[layer % 2]
        with torch.cuda.stream(self.stream):
            free = self._free[layer % 2]
            if free is not None:
                self.stream.wait_event(free)
            tensors, at = [], 0
            for which, name in enumerate(self._names[layer]):
                arg = self.shapes[name]
                size = self.num_experts * arg.expert_bytes
                target = buffer[at : at + size]
                self._copy_parts(layer, which, target.view(self.num_experts, -1), arg.band_bytes)
                tensors.append(target)
                at += -(-size // 256) * 256
            copied = torch.cuda.Event()
            copied.record(self.stream)
        self._ready[layer] = tensors, copied

    def _copy_parts(self, layer: int, which: int, target: torch.Tensor, band_bytes: int) -> None:
        for first_band, source in self._sources(layer, which):
            first = first_band * band_bytes
            target[:, first : first + source.shape[1]].copy_(source, non_blocking=True)

    def _sources(self, layer: int, which: int) -> list[tuple[int, torch.Tensor]]:
        """First band and bytes of each part of a tensor; asked for once, they never move."""
        key = layer, which
        if key not in self._host:
            parts = self.cpu.parts(layer, which)
            self._host[key] = [(p.first_band, torch.from_numpy(p.data)) for p in parts]
        return self._host[key]

    def _matrix(self, name: str, data: torch.Tensor) -> PackedMatrix:
        arg = MatrixArg.from_buffer_copy(self.shapes[name])
        arg.data = data.data_ptr()
        return PackedMatrix(data, arg, self.num_experts)
