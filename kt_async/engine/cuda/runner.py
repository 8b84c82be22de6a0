"""Runs steps on the GPU: decode as CUDA graphs of fixed row counts, everything else eagerly.

Decode rows are padded to the next bucket (idle rows attend one position of a scratch page), a kernel
fetches their metadata, and one native call replays the graph, serves the CPU experts'
hand-off and waits. Prompt rows run the same forward eagerly. A step that has both runs as two parts,
so that a decode row's result never depends on the prompts beside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.attention import (
    FlashDecode,
    Heads,
    make_decode_planner,
    make_prefill_planner,
    make_scratch,
)
from kt_async.engine.cuda.block import Block
from kt_async.engine.cuda.decode import PagedDecode, is_served
from kt_async.engine.cuda.forward import Forward, Part, prompt_part
from kt_async.engine.cuda.handoff import HandoffExperts
from kt_async.engine.cuda.kernels import no_old_graphs
from kt_async.engine.cuda.lane import CudaLane
from kt_async.engine.cuda.ops import CudaOps, RoutedExperts
from kt_async.engine.cuda.stream import around_step
from kt_async.engine.cuda.values import StepTensors
from kt_async.engine.gpu_memory import buckets
from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.handoff import Handoff
from kt_async.model.spec import ModelSpec

log = logging.getLogger(__name__)

_LAYER_TIMEOUT_NS = 10_000_000_000


@dataclass(slots=True)
class Graph:
    """A captured decode step of `rows` rows."""

    rows: int
    graph: torch.cuda.CUDAGraph
    exec: int  # the CUDA handle
    planner: FlashDecode | None  # where our own decode attention does not serve the shapes
    step: StepTensors  # its tensors are read by the graph: they must live as long
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class CudaLimits:
    """Capacities, all in units of the scheduler's layout."""

    page_size: int
    num_pages: int  # the scheduler's; one scratch page is added
    sample_vocab: int
    max_page_ids: int  # most page ids of one step
    num_host_pages: int = 0  # of the second KV tier
    kv_fp8: bool = False  # pages of e4m3 instead of bf16


class CudaRunner:
    """Implements runner.Runner. [engine]"""

    def __init__(
        self,
        ops: CudaOps,
        spec: ModelSpec,
        layout: structs.BlockLayout,
        limits: CudaLimits,
        *,
        decode_experts: RoutedExperts,
        prefill_experts: RoutedExperts,
        handoff: Handoff,
        use_graphs: bool,
    ) -> None:
        self._ops, self._spec, self._limits, self._pages = ops, spec, limits, ops.pages
        self._decode_experts, self._prefill_experts = decode_experts, prefill_experts
        self._handoff = handoff
        self.on_close: Callable[[], None] = lambda: None  # frees what the runner was given
        self._layout = layout
        self.block = Block(layout)
        kv_dtype = ops.pages.layers[0].dtype
        heads = Heads(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim**-0.5, kv_dtype
        )
        self._heads = heads
        self._prefill = make_prefill_planner(heads, limits.page_size)
        if is_served(heads, limits.page_size):
            rows = layout.max_rows
            ops.decode_attention = PagedDecode.allocate(heads, self.block, limits.page_size, rows)
        self._forward = Forward(ops, spec, self.block, limits.sample_vocab)
        self._logits = self._forward.work  # of the last step
        self.result = self._forward.result
        self._stats = {"graph_steps": 0.0, "eager_steps": 0.0, "run_ns": 0.0, "expert_ns": 0.0}
        self._graphs: dict[int, Graph] = {}
        self._stream = torch.cuda.Stream(priority=-1)  # before the lane's
        self._gpu_step = structs.sized(
            structs.GpuStep,
            stream=self._stream.cuda_stream,
            block_device=self.block.device.data_ptr(),
            block_host=self.block.host.data_ptr(),
            results_host=self._forward.host_out.data_ptr(),
            results_device=self._forward.out.data_ptr(),
            results_bytes=self._forward.out.nbytes,
            timeout_ns=_LAYER_TIMEOUT_NS,
        )
        # Buffers above are cleared, and weights and pages filled, on the default stream, which the
        # streams of steps do not wait for: on a busy GPU a first step would see them half made.
        torch.cuda.synchronize()
        if use_graphs:
            self._capture_all()
        self.lane = CudaLane(
            ops,
            spec,
            layout,
            prefill_experts,
            self._prefill,
            self._stream,
            limits.sample_vocab,
            has_graphs=bool(self._graphs),
        )
        torch.cuda.synchronize()

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        assert num_bytes == self._layout.num_bytes
        return self.block.array

    def run(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        assert block.ctypes.data == self.block.array.ctypes.data, "not the block from make_block"
        try:
            self._run(plan)
        except torch.OutOfMemoryError as error:
            # Whatever the step had got is free again: only its own requests need to end.
            torch.cuda.synchronize()
            raise NativeError(
                structs.KT_ERR_MEMORY,
                f"a step of {plan.num_tokens} tokens needs more GPU memory than is free; lower "
                "--chunk_size or --gpu_memory_utilization",
            ) from error

    def _run(self, plan: structs.Plan) -> None:
        begin = time.monotonic_ns()
        if plan.num_copies_out or plan.num_copies_in:
            with torch.cuda.stream(self._stream):
                self._pages.move(plan, self._layout, self.block.array)
                if plan.num_tokens == 0:
                    # The block is written anew before these copies were read: wait for them.
                    self._stream.synchronize()
                    return
        decode = plan.num_decode_rows
        graph = next((g for n, g in self._graphs.items() if n >= decode), None) if decode else None
        if decode == plan.num_rows:
            self._run_decode(graph, plan, decode, plan.num_page_ids)
        elif decode == 0:
            self._run_eagerly(plan, prompt_part(plan, 0))
        else:
            block = self.block.array[: plan.used_bytes]
            kept = block.copy()  # the graph's idle rows take the places of the prompt rows
            self._run_decode(graph, plan, decode, self.block.first_page(decode))
            block[:] = kept
            self._run_eagerly(plan, prompt_part(plan, decode))
        self._stats["run_ns"] += time.monotonic_ns() - begin

    def _run_decode(self, graph: Graph | None, plan: structs.Plan, rows: int, pages: int) -> None:
        if graph is not None:
            self._run_graph(graph, plan, rows, pages)
        else:
            self._run_eagerly(plan, Part((0, rows), (0, rows), (0, rows), is_decode=True))

    def read_logits(self, count: int) -> npt.NDArray[np.float32]:
        """Logits [count, V] of the last part of the step just run (tests and evaluation)."""
        logits: npt.NDArray[np.float32] = self._logits[:count].cpu().numpy()
        return logits

    def graph_seconds(self, rows: int, repeats: int = 20) -> float | None:
        """GPU time of the last decode step, replayed without a host; None where it needs a CPU."""
        graph = self._graphs.get(rows)
        if graph is None or isinstance(self._decode_experts, HandoffExperts):
            return None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            for _ in range(repeats):
                graph.graph.replay()
            end.record()
        self._stream.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / repeats

    def stats(self) -> dict[str, float]:
        return dict(self._stats)

    def close(self) -> None:
        self.lane.close()
        self._graphs.clear()
        self._handoff.close()
        self.on_close()

    def _run_eagerly(self, plan: structs.Plan, part: Part) -> None:
        b, used = self.block, plan.used_bytes
        stream = self._stream if part.is_decode else self._ops.prompt_stream
        stream.wait_stream(self._stream)
        with torch.cuda.stream(stream):
            b.device[:used].copy_(b.host[:used], non_blocking=True)
            is_own = part.is_decode and self._ops.decode_attention
            attend = None if is_own else self._prefill.plan(b.pages(*part.rows, on_host=False))
            experts, rows = self._prefill_experts, part.tokens[1] - part.tokens[0]
            with around_step(experts, rows, is_decode=part.is_decode):
                step = self._forward.step(part, attend)
                self._logits = self._forward.run(step, part, experts)
                self._forward.read_back()
        self._stats["eager_steps"] += 1

    @no_old_graphs()
    def _capture_all(self) -> None:
        begin = time.monotonic()
        sizes = buckets(self._layout.max_rows)
        limits = self._limits
        scratch = None if self._ops.decode_attention else make_scratch()
        if isinstance(self._decode_experts, HandoffExperts):
            self._decode_experts.warm_up(self._ops, self._spec.hidden_size)
        for rows in reversed(sizes):  # the largest first: the others reuse its memory pool
            planner = None
            if scratch is not None:
                planner = make_decode_planner(
                    self._heads, limits.page_size, rows, limits.max_page_ids + rows, scratch
                )
                if planner is None:
                    log.info("flashinfer is not installed: decode runs without CUDA graphs")
                    return
            self._graphs[rows] = self._capture(rows, planner)
        self._graphs = dict(sorted(self._graphs.items()))
        log.info("captured %d graphs in %.1f s", len(sizes), time.monotonic() - begin)

    def _capture(self, rows: int, planner: FlashDecode | None) -> Graph:
        self.block.fill_idle(0, rows, self._limits.num_pages, self._limits.page_size)
        pool = next((g.graph.pool() for g in self._graphs.values()), None)
        part = Part((0, rows), (0, rows), (0, rows), is_decode=True)
        with torch.cuda.stream(self._stream):
            self.block.device.copy_(self.block.host)
            attend = None
            if planner is not None:
                attend = planner.plan(self.block.pages(0, rows, on_host=True))
            step = self._forward.step(part, attend)
            # A capture cannot load modules or pick algorithms: run everything once before. The
            # hand-off needs the CPU's side of the protocol, which is not there yet.
            warm = (
                self._prefill_experts
                if isinstance(self._decode_experts, HandoffExperts)
                else self._decode_experts
            )
            with around_step(warm, rows, is_decode=True):
                self._forward.run(step, part, warm)
                self._stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                logits = self._forward.run(step, part, self._decode_experts)
            graph.instantiate()
        return Graph(rows, graph, graph.raw_cuda_graph_exec(), planner, step, logits)

    def _run_graph(self, graph: Graph, plan: structs.Plan, rows: int, page_ids: int) -> None:
        """rows: in use; the block's first page_ids page ids are theirs."""
        limits = self._limits
        page_ids = self.block.fill_idle(
            rows, graph.rows, limits.num_pages, limits.page_size, page_ids
        )
        if graph.planner is not None:
            with torch.cuda.stream(self._stream):
                graph.planner.plan(self.block.pages(0, graph.rows, on_host=True))
        self.block.load(self._ops.kernels, self._stream, graph.rows, page_ids, plan)
        step = self._gpu_step
        step.num_tokens = graph.rows
        step.graph_exec = graph.exec
        self._handoff.run(step)
        self._logits = graph.logits
        self._stats["graph_steps"] += 1
        self._stats["expert_ns"] += step.expert_ns
        if isinstance(self._decode_experts, HandoffExperts):
            self._decode_experts.channel.check()
