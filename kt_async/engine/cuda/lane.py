"""Prompt steps on the GPU beside decode graphs: layer by layer, on a stream of lower priority.

The engine thread queues some layers, runs a decode step, and comes back; nothing waits for the GPU
but `advance(alone=True)`. Experts in host memory are copied, never computed by the CPU, which
belongs to the decode rows. How many layers are queued at a time (engine/pace.py) decides how the
two share the engine thread, the GPU and the bus.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.attention import Planner, load_kernels
from kt_async.engine.cuda.block import Block
from kt_async.engine.cuda.forward import Forward, prompt_part
from kt_async.engine.cuda.ops import CudaOps, RoutedExperts
from kt_async.engine.cuda.router import Router
from kt_async.engine.cuda.stream import StreamedExperts, around_step
from kt_async.engine.pace import Pace
from kt_async.engine.runner import StepResult
from kt_async.ffi import structs
from kt_async.model import run_to_end
from kt_async.model.spec import ModelSpec

_ALONE = 8  # layers on the stream while nobody decodes


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
        *,
        has_graphs: bool,
    ) -> None:
        """planner and experts belong to the lane while a step is in flight.

        Where decode steps have no graphs they need both themselves, and experts that cannot be
        copied need the CPU: a step then runs to its end in start().
        """
        self._layout, self._pages = layout, ops.pages
        self._experts, self._planner, self._decode_stream = experts, planner, decode_stream
        self._block = Block(layout)
        own_ops = replace(ops, router=Router())  # its buffers serve one stream
        self._forward = Forward(own_ops, spec, self._block, sample_vocab)
        self._stream = ops.prompt_stream
        load_kernels(planner, spec.num_heads, ops.pages.layers[0])
        self._layers: Generator[None, None, torch.Tensor] | None = None  # what is left to queue
        self._queued: deque[torch.cuda.Event] = deque()  # one after each piece on the stream
        can_copy = not isinstance(experts, StreamedExperts) or experts.copies is not None
        self._is_parallel = has_graphs and can_copy
        self._pace = Pace()
        self._is_new = False  # nothing queued yet
        self._queued_at = 0.0  # when layers were queued last; 0: not in this step

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
        self._is_new = True
        if plan.num_tokens > 0:
            with torch.cuda.stream(self._stream):
                if self._is_parallel:
                    if isinstance(self._experts, StreamedExperts):
                        self._experts.begin_step(plan.num_tokens, use_cpu=False)
                    self._layers = self._begin_forward(plan)
                else:
                    with around_step(self._experts, plan.num_tokens, is_decode=False):
                        run_to_end(self._begin_forward(plan))
                        self._forward.read_back()
        self._mark()

    def advance(self, *, alone: bool) -> None:
        now = time.monotonic()
        if self._is_new and not alone:
            # Beginning a step took its time already; the first layer's experts are on their way.
            self._is_new, self._queued_at = False, 0.0
            return
        if alone and len(self._queued) > 1:
            self._queued[0].synchronize()
        self._forget_finished()
        left = len(self._queued)
        if self._queued_at and not alone:
            self._pace.observe_step(now - self._queued_at, left)
        for _ in range(_ALONE - left if alone else self._pace.layers(left)):
            if self._layers is not None:
                self._queue_layer(self._layers)
        self._queued_at = time.monotonic()
        if alone and self._layers is None and self._queued:
            self._queued[-1].synchronize()

    def is_complete(self) -> bool:
        self._forget_finished()
        return self._layers is None and not self._queued

    def close(self) -> None:
        """Wait until nothing queued, here or on the copies' stream, reads the weights any more."""
        self._layers = None
        with contextlib.suppress(RuntimeError):  # a GPU that has failed does nothing any more
            torch.cuda.synchronize()

    def _begin_forward(self, plan: structs.Plan) -> Generator[None, None, torch.Tensor]:
        b, used = self._block, plan.used_bytes
        b.device[:used].copy_(b.host[:used], non_blocking=True)
        part = prompt_part(plan, 0)
        attend = self._planner.plan(b.pages(*part.rows, on_host=False))
        return self._forward.layers(self._forward.step(part, attend), part, self._experts)

    def _queue_layer(self, layers: Generator[None, None, torch.Tensor]) -> None:
        begin = time.monotonic()
        with torch.cuda.stream(self._stream):
            try:
                next(layers)
            except StopIteration:
                self._layers = None
                self._forward.start_read_back()
        self._mark()
        self._pace.observe_queueing(time.monotonic() - begin)

    def _mark(self) -> None:
        event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        event.record(self._stream)
        self._queued.append(event)

    def _forget_finished(self) -> None:
        while self._queued and self._queued[0].query():
            self._queued.popleft()
