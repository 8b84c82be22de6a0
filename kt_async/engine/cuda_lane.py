"""Prompt steps on the GPU beside decode graphs: layer by layer, on a stream of lower priority.

The engine thread queues some layers, runs a decode step, and comes back; nothing waits for the GPU
but `advance(alone=True)`. Experts in host memory are copied, never computed by the CPU, which
belongs to the decode rows. How many layers are queued at a time decides how the two share the GPU
and the bus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda_attention import Planner
from kt_async.engine.cuda_block import Block
from kt_async.engine.cuda_forward import Forward, Part
from kt_async.engine.cuda_ops import CudaOps, RoutedExperts
from kt_async.engine.cuda_stream import StreamedExperts
from kt_async.engine.runner import StepResult
from kt_async.ffi import structs
from kt_async.model.spec import ModelSpec


class CudaLane:
    """Implements runner.Lane. [engine]"""

    def __init__(
        self,
        ops: CudaOps,
        spec: ModelSpec,
        layout: structs.BlockLayout,
        experts: RoutedExperts,
        planner: Planner,
        decode_stream: torch.cuda.Stream,
        sample_vocab: int,
    ) -> None:
        """planner and experts belong to the lane while a step is in flight."""
        self._layout, self._pages = layout, ops.pages
        self._experts, self._planner, self._decode_stream = experts, planner, decode_stream
        self._block = Block(layout)
        self._forward = Forward(replace(ops), spec, self._block, sample_vocab)
        self._stream = torch.cuda.Stream(priority=0)
        self._layers: Generator[None, None, torch.Tensor] | None = None  # what is left to queue
        self._queued: deque[torch.cuda.Event] = deque()  # one after each piece on the stream
        self.depth = 3

    @property
    def result(self) -> StepResult:
        return self._forward.result

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        assert num_bytes == self._layout.num_bytes
        return self._block.array

    def start(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        assert block.ctypes.data == self._block.array.ctypes.data, "not the block from make_block"
        if plan.num_copies_out or plan.num_copies_in:
            with torch.cuda.stream(self._decode_stream):  # all page copies in the plans' order
                self._pages.move(plan, layout, block)
        self._stream.wait_stream(self._decode_stream)
        if plan.num_tokens > 0:
            with torch.cuda.stream(self._stream):
                self._layers = self._begin_forward(plan)
        self._mark()

    def advance(self, *, alone: bool) -> None:
        if alone and len(self._queued) > 1:
            self._queued[0].synchronize()
        self._forget_finished()
        while self._layers is not None and len(self._queued) < self.depth:
            self._queue_layer(self._layers)
        if alone and self._layers is None and self._queued:
            self._queued[-1].synchronize()

    def is_complete(self) -> bool:
        self._forget_finished()
        return self._layers is None and not self._queued

    def _begin_forward(self, plan: structs.Plan) -> Generator[None, None, torch.Tensor]:
        b, used = self._block, plan.used_bytes
        b.device[:used].copy_(b.host[:used], non_blocking=True)
        if isinstance(self._experts, StreamedExperts):
            self._experts.begin_step(plan.num_tokens, use_cpu=False)
        rows = (0, plan.num_rows)
        part = Part(rows, (0, plan.num_tokens), (0, plan.num_samples), is_decode=False)
        attend = self._planner.plan(b.pages(*rows, on_host=False))
        return self._forward.layers(self._forward.step(part, attend), part, self._experts)

    def _queue_layer(self, layers: Generator[None, None, torch.Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            try:
                next(layers)
            except StopIteration:
                self._layers = None
                self._forward.start_read_back()
        self._mark()

    def _mark(self) -> None:
        event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        event.record(self._stream)
        self._queued.append(event)

    def _forget_finished(self) -> None:
        while self._queued and self._queued[0].query():
            self._queued.popleft()
