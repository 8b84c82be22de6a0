"""Runs steps on the GPU: decode as CUDA graphs of fixed row counts, everything else eagerly.

A pure decode step is padded to the next bucket (idle rows attend one position of a scratch page),
its metadata is copied as one block, and one native call replays the graph, serves the CPU experts'
hand-off and waits. Prefill and mixed steps run the same forward eagerly.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda_attention import (
    FlashDecode,
    Heads,
    StepPages,
    make_decode_planner,
    make_prefill_planner,
)
from kt_async.engine.cuda_block import SAMPLE_DTYPE, Block
from kt_async.engine.cuda_experts import moe_names
from kt_async.engine.cuda_offload import HandoffExperts, StreamedExperts
from kt_async.engine.cuda_ops import CudaOps, RoutedExperts
from kt_async.engine.cuda_values import StepTensors
from kt_async.engine.runner import StepResult
from kt_async.errors import EngineError
from kt_async.ffi import structs
from kt_async.ffi.handoff import Handoff
from kt_async.model import FORWARDS
from kt_async.model.spec import ModelSpec

log = logging.getLogger(__name__)

_SAMPLE_THREADS = 1024
_LAYER_TIMEOUT_NS = 10_000_000_000


def buckets(max_rows: int) -> list[int]:
    """Row counts with a graph of their own: 1 2 3 4 6 8 12 16 24 32 ... up to max_rows."""
    sizes = [1, 2, 3]
    step = 4
    while sizes[-1] < max_rows:
        sizes.extend([step, step * 3 // 2])
        step *= 2
    return [*(s for s in sizes if s < max_rows), max_rows]


@dataclass(slots=True)
class Graph:
    """A captured decode step of `rows` rows."""

    rows: int
    graph: torch.cuda.CUDAGraph
    planner: FlashDecode
    step: StepTensors  # its tensors are read by the graph: they must live as long


@dataclass(frozen=True, slots=True)
class CudaLimits:
    """Capacities, all in units of the scheduler's layout."""

    page_size: int
    num_pages: int  # the scheduler's; one scratch page is added
    sample_vocab: int
    max_page_ids: int  # most page ids of one step
    num_host_pages: int = 0  # of the second KV tier


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
        self._forward: Callable[..., object] = FORWARDS[spec.architecture]
        heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim**-0.5)
        self._heads = heads
        self._prefill = make_prefill_planner(heads, limits.page_size)
        capacity = layout.max_samples
        vocab = spec.vocab_size
        self._logits = torch.empty((capacity, vocab), dtype=torch.float32, device="cuda")
        self._work = torch.empty_like(self._logits)
        top = structs.KT_MAX_LOGPROBS
        # One device tensor and one pinned twin hold all results: a single copy brings them back.
        self._out_words = capacity * (2 + 2 * top)
        self._out = torch.zeros(self._out_words, dtype=torch.int32, device="cuda")
        self._host_out = torch.zeros(self._out_words, dtype=torch.int32, pin_memory=True)
        words = self._host_out.numpy()
        self.result = StepResult(
            tokens=words[:capacity],
            logprobs=words[capacity : 2 * capacity].view(np.float32),
            top_ids=words[2 * capacity : (2 + top) * capacity].reshape(capacity, top),
            top_logprobs=words[(2 + top) * capacity :].view(np.float32).reshape(capacity, top),
        )
        self._moe_names = moe_names(spec)
        self._stats = {"graph_steps": 0.0, "eager_steps": 0.0, "run_ns": 0.0, "expert_ns": 0.0}
        self._graphs: dict[int, Graph] = {}
        self._stream = torch.cuda.Stream()
        self._gpu_step = structs.sized(
            structs.GpuStep,
            stream=self._stream.cuda_stream,
            block_device=self.block.device.data_ptr(),
            block_host=self.block.host.data_ptr(),
            results_host=self._host_out.data_ptr(),
            results_device=self._out.data_ptr(),
            results_bytes=4 * self._out_words,
            timeout_ns=_LAYER_TIMEOUT_NS,
        )
        if use_graphs:
            self._capture_all()

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        assert num_bytes == self._layout.num_bytes
        return self.block.array

    def run(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        begin = time.monotonic_ns()
        assert block.ctypes.data == self.block.array.ctypes.data, "not the block from make_block"
        with torch.cuda.stream(self._stream):
            if plan.num_copies_out or plan.num_copies_in:
                self._pages.move(plan, self._layout, self.block.array)
            if plan.num_tokens == 0:
                # The block is written anew before these copies were read: wait for them.
                self._stream.synchronize()
                return
            rows = plan.num_rows
            graph = None
            if plan.num_tokens == plan.num_decode_rows == plan.num_samples:
                graph = next((g for n, g in self._graphs.items() if n >= rows), None)
            if graph is not None:
                self._run_graph(graph, plan)
            else:
                self._run_eager(plan)
        self._stats["graph_steps" if graph else "eager_steps"] += 1
        self._stats["run_ns"] += time.monotonic_ns() - begin

    def read_logits(self, count: int) -> npt.NDArray[np.float32]:
        """Logits [count, V] of the step just run (tests and evaluation)."""
        logits: npt.NDArray[np.float32] = self._logits[:count].cpu().numpy()
        return logits

    def stats(self) -> dict[str, float]:
        return dict(self._stats)

    def close(self) -> None:
        self._graphs.clear()
        self._handoff.close()
        self.on_close()

    # ---- one forward

    def _step(self, tokens: int, samples: int, planner_attend: object) -> StepTensors:
        b = self.block
        params = b.device[self._layout.samples :].view(torch.int32)
        words = SAMPLE_DTYPE.itemsize // 4
        at = SAMPLE_DTYPE.fields["token_index"][1] // 4  # type: ignore[index]
        logit_tokens = params[: samples * words].view(samples, words)[:, at].long()
        return StepTensors(
            tokens=b.ints("tokens", tokens),
            positions=b.ints("positions", tokens),
            kv_slot=b.ints("kv_slot", tokens),
            logit_tokens=logit_tokens,
            sampled=self._out,
            attend=planner_attend,  # type: ignore[arg-type]
        )

    def _run_forward(self, step: StepTensors, samples: int, experts: RoutedExperts) -> None:
        self._ops.step = step
        self._ops.experts_backend = experts
        logits = self._forward(self._ops, self._spec)
        self._logits[:samples] = logits.f32  # type: ignore[attr-defined]
        self._sample(samples)

    def _sample(self, samples: int) -> None:
        b, capacity, top = self.block, self._layout.max_samples, structs.KT_MAX_LOGPROBS
        out = self._out.data_ptr()
        pointers = [
            ctypes.c_void_p(self._logits.data_ptr()),
            ctypes.c_void_p(self._work.data_ptr()),
            ctypes.c_int32(self._spec.vocab_size),
            ctypes.c_int32(self._limits.sample_vocab),
            *(
                ctypes.c_void_p(b.address(name))
                for name in ("samples", "bias_ids", "bias_values", "history_ids", "history_counts")
            ),
            ctypes.c_void_p(out),
            ctypes.c_void_p(out + 4 * capacity),
            ctypes.c_void_p(out + 8 * capacity),
            ctypes.c_void_p(out + 4 * (2 + top) * capacity),
        ]
        self._ops.launch("sample", (samples, 1), pointers, _SAMPLE_THREADS)

    def _run_eager(self, plan: structs.Plan) -> None:
        b = self.block
        used = plan.used_bytes
        b.device[:used].copy_(b.host[:used], non_blocking=True)
        rows = plan.num_rows
        pages = StepPages(
            row_start=b.host_ints("row_start", rows + 1),
            page_start=b.host_ints("page_start", rows + 1),
            last_page_len=b.host_ints("last_page_len", rows),
            page_ids=b.ints("page_ids", plan.num_page_ids),
        )
        attend = self._prefill.plan(pages)
        experts = self._prefill_experts
        if isinstance(experts, StreamedExperts):
            experts.begin_step(plan.num_tokens, self._moe_names)
        step = self._step(plan.num_tokens, plan.num_samples, attend)
        self._run_forward(step, plan.num_samples, experts)
        self._host_out.copy_(self._out, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    # ---- graphs

    def _capture_all(self) -> None:
        begin = time.monotonic()
        sizes = buckets(self._layout.max_rows)
        for rows in reversed(sizes):  # the largest first: the others reuse its memory pool
            planner = make_decode_planner(
                self._heads, self._limits.page_size, rows, self._limits.max_page_ids + rows
            )
            if planner is None:
                log.info("flashinfer is not installed: decode runs without CUDA graphs")
                return
            self._graphs[rows] = self._capture(rows, planner)
        self._graphs = dict(sorted(self._graphs.items()))
        log.info("captured %d graphs in %.1f s", len(sizes), time.monotonic() - begin)

    def _capture(self, rows: int, planner: FlashDecode) -> Graph:
        self.block.fill_idle(0, rows, self._limits.num_pages, self._limits.page_size)
        pool = next((g.graph.pool() for g in self._graphs.values()), None)
        with torch.cuda.stream(self._stream):
            self.block.device.copy_(self.block.host)
            attend = planner.plan(self.block.decode_pages(rows, rows))
            step = self._step(rows, rows, attend)
            step.logit_tokens = torch.arange(rows, device="cuda")
            # A capture cannot load modules or pick algorithms: run everything once before. The
            # hand-off needs the CPU's side of the protocol, which is not there yet.
            warm = (
                self._prefill_experts
                if isinstance(self._decode_experts, HandoffExperts)
                else self._decode_experts
            )
            if isinstance(warm, StreamedExperts):
                warm.begin_step(rows, self._moe_names)
            self._run_forward(step, rows, warm)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._run_forward(step, rows, self._decode_experts)
            graph.instantiate()
        return Graph(rows, graph, planner, step)

    def _run_graph(self, graph: Graph, plan: structs.Plan) -> None:
        page_ids = self.block.fill_idle(
            plan.num_rows,
            graph.rows,
            self._limits.num_pages,
            self._limits.page_size,
            plan.num_page_ids,
        )
        graph.planner.plan(self.block.decode_pages(graph.rows, page_ids))
        step = self._gpu_step
        step.num_tokens = graph.rows
        step.graph_exec = graph.graph.raw_cuda_graph_exec()
        step.block_bytes = self._layout.page_ids + 4 * page_ids
        self._handoff.run(step)
        self._stats["expert_ns"] += step.expert_ns
        if isinstance(self._decode_experts, HandoffExperts):
            error = int(self._decode_experts.buffers.error[0])
            if error:
                raise EngineError(f"the CPU experts did not answer the GPU (state {error})")
