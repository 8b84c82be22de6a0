"""Drive scheduler and CPU runner by hand, without threads or HTTP, and look at every logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_async.engine.runner import CpuLimits, CpuRunner
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.pool import Pool
from kt_async.ffi.scheduler import Scheduler
from kt_async.model.spec import ModelSpec, spec_from_gguf
from kt_async.weights.source import ModelFiles, open_model

MakeRunner = Callable[[ModelFiles, ModelSpec, Pool, structs.BlockLayout, CpuLimits], Any]

GREEDY = SamplingParams(temperature=0.0)


class DirectEngine:
    """One model, stepped synchronously."""

    def __init__(
        self,
        path: Path,
        *,
        chunk_size: int = 256,
        max_batch_size: int = 4,
        max_len: int = 1024,
        kv_type: int = structs.KT_KV_F32,
        isa: int = structs.KT_ISA_AUTO,
        num_threads: int = 0,
        num_pages: int | None = None,
        page_size: int = 32,
        make_runner: MakeRunner | None = None,
        num_host_pages: int = 0,
        lane_tokens: int = 0,
    ) -> None:
        self.files = open_model(path)
        self.spec = spec_from_gguf(self.files)
        self.vocab_size = self.spec.vocab_size
        pages = num_pages or max_batch_size * (-(-max_len // page_size))
        max_samples = chunk_size + max_batch_size
        self.scheduler = Scheduler(
            structs.sized(
                structs.SchedConfig,
                policy=structs.KT_SCHED_FCFS,
                max_batch_size=max_batch_size,
                chunk_size=chunk_size,
                page_size=page_size,
                num_pages=pages,
                max_len=max_len,
                max_queue=1024,
                max_samples=max_samples,
                watermark_pages=0,
                num_host_pages=num_host_pages,
                lane_tokens=lane_tokens,
                flags=structs.KT_SCHED_PREFIX_CACHE if num_host_pages else 0,
            )
        )
        pool = Pool(num_threads=num_threads, isa=isa)
        limits = CpuLimits(
            max_tokens=self.scheduler.layout.max_tokens,
            max_rows=self.scheduler.layout.max_rows,
            max_samples=self.scheduler.layout.max_samples,
            page_size=page_size,
            num_pages=pages,
            kv_type=kv_type,
            sample_vocab=self.spec.vocab_size,
        )
        self.runner: Any
        if make_runner is None:
            self.runner = CpuRunner(self.files, self.spec, pool, limits, show_progress=False)
        else:
            self.runner = make_runner(self.files, self.spec, pool, self.scheduler.layout, limits)
        self.block = self.runner.make_block(self.scheduler.layout.num_bytes)
        self._now = 0
        self._next_id = 1

    def close(self) -> None:
        self.runner.close()
        self.scheduler.close()
        self.files.close()

    def submit(self, request: GenerationRequest) -> int:
        seq_id, self._next_id = self._next_id, self._next_id + 1
        assert self.scheduler.submit(seq_id, request, self._now)
        return seq_id

    def step(self) -> list[tuple[int, ...]]:
        """Plan, run and commit once; returns the events."""
        self._now += 1_000_000
        if self.scheduler.plan(self._now, self.block.ctypes.data):
            plan = self.scheduler.plan_struct
            self.runner.run(plan, self.scheduler.layout, self.block)
            tokens = self.runner.result.tokens
            self.scheduler.commit(self._now, tokens.ctypes.data, plan.num_samples)
        return [tuple(e) for e in self.scheduler.drain().tolist()]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: SamplingParams = GREEDY
    ) -> list[list[int]]:
        """All prompts at once; the generated ids of each."""
        ids = [self.submit(GenerationRequest("test", p, max_tokens, sampling)) for p in prompts]
        outputs: dict[int, list[int]] = {i: [] for i in ids}
        running = set(ids)
        while running:
            for seq_id, kind, _finish, token, *_ in self.step():
                if kind == structs.KT_EVENT_TOKEN:
                    outputs[seq_id].append(token)
                elif kind == structs.KT_EVENT_FINISH:
                    running.discard(seq_id)
        return [outputs[i] for i in ids]

    def prompt_logits(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [len(prompt), V] of every prompt position, through chunked prefill."""
        sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
        self.submit(GenerationRequest("test", prompt, 1, sampling))
        logits = np.full((len(prompt), self.vocab_size), np.nan, np.float32)
        layout = self.scheduler.layout
        positions = self.block[layout.positions :].view(np.int32)
        params_dtype = np.dtype(structs.SampleParams)
        for _ in range(10 * len(prompt)):
            events = self.step()
            count = self.scheduler.plan_struct.num_samples
            size = count * params_dtype.itemsize
            params = self.block[layout.samples : layout.samples + size].view(params_dtype)
            logits[positions[params["token_index"]]] = self.runner.read_logits(count)
            if any(e[1] == structs.KT_EVENT_FINISH for e in events):
                return logits
        raise AssertionError("the prompt did not finish")


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Along the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def mean_kl(exact: npt.NDArray[np.float64], ours: npt.NDArray[np.float64]) -> float:
    """Mean over positions of KL(exact || ours), from log-probabilities, in nats."""
    return float((np.exp(exact) * (exact - ours)).sum(axis=-1).mean())
