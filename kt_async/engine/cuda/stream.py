"""Routed experts of prompt chunks: part copied over PCIe for the GPU, part left on the CPU.

Long chunks copy every expert, where the cost model (engine/expert_split.py) says so. Otherwise, per
layer: the ids come to the host, the model picks the experts to stream, the native library's threads
run the CPU's experts, and meanwhile the copies, the GPU's products and the next layer up to its
router are put on their streams. There a kernel waits for the CPU's sum (engine/cuda/cpu_part.py),
which is added last, in a fixed order. Two device buffers alternate, so that part of the next layer's
experts is copied before that layer's rows are known: the bus never rests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.copies import ExpertCopies
from kt_async.engine.cuda.cpu_part import CpuPart
from kt_async.engine.cuda.experts import Names, VramExperts
from kt_async.engine.cuda.grouped import (
    HostPart,
    grouped_multiply,
    multiply_rows,
    sort_rows,
    sum_rows,
)
from kt_async.engine.cuda.ops import CudaOps, RoutedExperts
from kt_async.engine.cuda.values import Rows
from kt_async.engine.expert_split import LayerRates, SplitRates
from kt_async.errors import NativeError


@dataclass(slots=True)
class StreamedExperts:
    """Implements ops.RoutedExperts for steps that run eagerly."""

    cpu: CpuPart
    layer_of: Mapping[str, int]
    num_experts: int
    vram: VramExperts  # computes the layers that are not in layer_of
    copies: ExpertCopies | None = None  # None: everything stays on the CPU
    rates: SplitRates | None = None  # None: stream every expert, if copies can be made
    probe: int = 0  # calibration: the CPU gets so many experts of a layer, nobody the others
    _use_cpu: bool = True
    _use_gpu: bool = True
    _tokens: int = 0
    _ahead_of: dict[LayerRates, int] = field(default_factory=dict)  # in this step, by kind
    _all_of: dict[LayerRates, bool] = field(default_factory=dict)  # likewise
    _ahead: dict[int, int] = field(default_factory=dict)  # layer -> experts copied ahead
    _copied: dict[int, torch.cuda.Event] = field(default_factory=dict)

    @contextmanager
    def step(self, rows: int, *, use_gpu: bool = True) -> Iterator[None]:
        """Around a forward and the wait for its stream. Raises what failed on the CPU.

        This thread stays on the core without a worker: a worker that has to share its core is late,
        and all others wait for it.
        """
        self._use_gpu = use_gpu
        before = _move_to(self.cpu.cpu.caller_cpu if self.num_spared else -1)
        try:
            self.begin_step(rows, use_gpu=use_gpu)
            yield
            self.cpu.join()
            self.cpu.check()
        finally:
            with suppress(NativeError):  # known, or less than what is being raised
                self.cpu.join()
            os.sched_setaffinity(0, before)

    def begin_step(self, rows: int, *, use_cpu: bool = True, use_gpu: bool = True) -> None:
        """Called before a forward: forgets copies of the last step and starts the first ones.

        use_cpu: False while the CPU belongs to others: every expert that the GPU can read is
        streamed, and the host never waits for the GPU. use_gpu: False for generated tokens, which
        the CPU multiplies as in the graphs, with company or without.
        """
        self._use_cpu, self._use_gpu = use_cpu, use_gpu
        self._ahead.clear()
        self._ahead_of.clear()
        self._all_of.clear()
        self._copied.clear()
        self._tokens = rows
        self._copy_ahead(0)

    @property
    def num_spared(self) -> int:
        """Workers that leave their core to the thread that drives the GPU."""
        return int(self._use_gpu and self.copies is not None)

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
        if self._streams_all(layer):
            return self._stream_all(ops, x, residual, ids, weights, layer)
        return self._share(ops, x, residual, ids, weights, layer)

    def _streams_all(self, layer: int) -> bool:
        """Every expert of the layer is copied, without waiting for ids."""
        if self.copies is None or not self._use_gpu:
            return False
        if self.rates is None or not self._use_cpu:
            return True
        kind = self.rates.layers[layer]
        if kind not in self._all_of:
            top_k = self.cpu.host.ids.shape[1]
            made = self.rates.streams_all(layer, self._tokens, top_k, self.num_experts)
            self._all_of[kind] = made and not self.probe
        return self._all_of[kind]

    def _stream_all(
        self,
        ops: CudaOps,
        x: Rows,
        residual: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        layer: int,
    ) -> torch.Tensor | Rows:
        copies = self.copies
        assert copies is not None
        self._copy_ahead(layer + 1)
        torch.cuda.current_stream().wait_event(self._copied[layer])
        out = grouped_multiply(ops, x, residual, ids, weights, copies.matrices(layer))
        copies.release(layer)
        return out

    def _share(
        self,
        ops: CudaOps,
        x: Rows,
        residual: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        layer: int,
    ) -> torch.Tensor:
        assert x.f32 is not None
        cpu, host = self.cpu, self.cpu.host
        ids_known = cpu.fetch(ops, x.f32, ids, weights)
        cpu.join()  # asleep: until then the workers have better use for this core
        ids_known.synchronize()
        host_ids = host.ids[: len(ids)].numpy()
        streamed = self._choose(layer, host_ids)
        self._start_cpu(layer, host_ids, streamed)
        host.gpu_computes.numpy()[:] = streamed
        part = HostPart(host.gpu_computes, host.out)
        by_expert = sort_rows(ops, ids, self.num_experts, part)
        y = None
        if streamed.any() and not self.probe:
            copies = self._copy_rest(layer, streamed)
            matrices = copies.matrices(layer)
            y = multiply_rows(ops, ops.as_bf16(x), by_expert, ids.shape[1], matrices)
            copies.release(layer)
        else:
            self._copy_ahead(layer + 1)
        if cpu.is_running:
            cpu.wait_in_stream(ops)
        return sum_rows(ops, y, by_expert, weights, residual, part)

    def _choose(self, layer: int, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """bool [E]: the experts that the GPU computes."""
        if self.copies is None or self.rates is None or not self._use_gpu:
            return np.zeros(self.num_experts, np.bool_)
        counts = np.bincount(ids[ids >= 0], minlength=self.num_experts)
        if self.probe:
            by_rows = np.argsort(np.where(counts > 0, counts, len(ids) + 1), kind="stable")
            elsewhere = np.ones(self.num_experts, np.bool_)
            elsewhere[by_rows[: self.probe]] = False
            return elsewhere
        return self.rates.choose(layer, self._tokens, counts, self._ahead.get(layer, 0))

    def _copy_rest(self, layer: int, streamed: npt.NDArray[np.bool_]) -> ExpertCopies:
        """Copy what was not copied ahead, then the next layer's first; the stream waits for it."""
        copies = self.copies
        assert copies is not None
        ahead = self._ahead.get(layer, 0)
        copied = copies.start(layer, np.flatnonzero(streamed[ahead:]) + ahead)
        self._copy_ahead(layer + 1)
        torch.cuda.current_stream().wait_event(copied)
        return copies

    def _copy_ahead(self, layer: int) -> None:
        copies = self.copies
        if copies is None or not self._use_gpu or layer >= len(self.layer_of) or self.probe:
            return
        count = self.num_experts
        if not self._streams_all(layer):
            assert self.rates is not None
            kind, top_k = self.rates.layers[layer], self.cpu.host.ids.shape[1]
            if kind not in self._ahead_of:
                made = self.rates.ahead(layer, self._tokens, top_k, self.num_experts)
                self._ahead_of[kind] = made
            count = self._ahead_of[kind]
        self._ahead[layer] = count
        if count > 0:
            self._copied[layer] = copies.start(layer, np.arange(count))

    def _start_cpu(
        self, layer: int, ids: npt.NDArray[np.int32], streamed: npt.NDArray[np.bool_]
    ) -> None:
        mine = np.where((ids < 0) | streamed[ids], np.int32(-1), ids)
        if (mine >= 0).any():
            # Here too the arithmetic belongs to the token: prompt tokens in bf16 where it is fast.
            is_prompt = np.ones(len(ids), np.uint8) if self._use_gpu else None
            self.cpu.start(layer, mine, is_prompt, num_spared=self.num_spared)


def around_step(
    experts: RoutedExperts, rows: int, *, is_decode: bool
) -> AbstractContextManager[None]:
    """What a backend wants around an eager forward and the wait for its stream."""
    if isinstance(experts, StreamedExperts):
        return experts.step(rows, use_gpu=not is_decode)
    return nullcontext()


def _move_to(core: int) -> set[int]:
    """Restrict this thread to a core (-1: leave it); returns where it could run before."""
    before = os.sched_getaffinity(0)
    if core >= 0:
        with suppress(OSError):  # the core was taken from the process since the pool was made
            os.sched_setaffinity(0, {core})
    return before
