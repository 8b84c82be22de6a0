"""What an expert layer costs beside its bytes: barriers, routing, hand-over between the threads.

Layers whose weights lie in the caches, 48 in a row, as in a whole step: as operations of a program
(`--device cpu`) and one by one from the caller, as a GPU step asks for them.
"""

from __future__ import annotations

import time

import numpy as np

from bench import stats
from bench.record import ResultFile
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.handoff import ExpertSet
from kt_async.ffi.lib import check, load
from kt_async.ffi.model import CpuModel
from kt_async.ffi.pool import Pool
from kt_async.ffi.scheduler import Scheduler
from kt_async.weights.gguf_header import TYPE_IDS

_LAYERS = 48
_STEPS = 60
_EXPERTS, _TOP_K, _INNER, _VOCAB = 8, 8, 32, 32


class _Tensor:
    """Q8_0 zeros (a scale of 0) or f32 noise of a shape."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.type = TYPE_IDS[name]
        if name == "F32":
            noise = np.random.default_rng(1).standard_normal(shape, np.float32)
            self.data = noise.reshape(-1).view(np.uint8)
        else:
            self.data = np.zeros(int(np.prod(shape)) // 32 * 34, np.uint8)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def native(self) -> structs.Tensor:
        return structs.tensor_at(self.type, self.shape, self.num_bytes, self.address)


def _experts(hidden: int) -> list[_Tensor]:
    up = (_EXPERTS, _INNER, hidden)
    return [_Tensor("Q8_0", shape) for shape in (up, up, (_EXPERTS, hidden, _INNER))]


def _program(pool: Pool, hidden: int) -> tuple[CpuModel, list[_Tensor]]:
    """Embedding, 48 times the same expert layer, logits; and what it borrows."""
    model = CpuModel(
        pool,
        structs.sized(
            structs.ModelConfig,
            max_tokens=4,
            max_rows=4,
            max_logit_rows=4,
            page_size=16,
            num_pages=4,
            vocab_size=_VOCAB,
            sample_vocab=_VOCAB,
        ),
    )
    tensors = [
        _Tensor("F32", (_VOCAB, hidden)),
        _Tensor("F32", (_EXPERTS, hidden)),
        *_experts(hidden),
    ]
    table = model.add_weight(tensors[0], tensors[0].address, structs.KT_WEIGHT_BORROW)
    weights = [model.add_weight(t, t.address, structs.KT_WEIGHT_MATRIX) for t in tensors]
    x, last = model.add_buffer(hidden, False), model.add_buffer(hidden, True)
    out, logits = model.add_buffer(hidden, False), model.add_buffer(_VOCAB, True)
    model.add_op(structs.KT_OP_EMBED, outputs=[x], weights=[table])
    for _ in range(_LAYERS):
        model.add_op(
            structs.KT_OP_MOE, inputs=[x], outputs=[out], weights=weights[1:], ints=[_TOP_K, 0, 1]
        )
    model.add_op(structs.KT_OP_GATHER, inputs=[out], outputs=[last])
    model.add_op(structs.KT_OP_LINEAR, inputs=[last], outputs=[logits], weights=[weights[0]])
    model.finish(logits)
    return model, tensors


def _program_seconds(pool: Pool, hidden: int) -> list[float]:
    """Seconds of an expert operation, averaged over the layers of each step."""
    model, tensors = _program(pool, hidden)
    config = structs.sized(
        structs.SchedConfig,
        max_batch_size=4,
        chunk_size=4,
        page_size=16,
        num_pages=4,
        max_len=32,
        max_queue=4,
        max_samples=4,
        watermark_pages=-1,
    )
    seconds = []
    with Scheduler(config) as scheduler:
        scheduler.submit(1, GenerationRequest("r", [1], 8, SamplingParams(temperature=0.0)), 0)
        block = np.zeros(scheduler.layout.num_bytes, np.uint8)
        scheduler.plan(1, block.ctypes.data)
        tokens = np.zeros(4, np.int32)
        out = structs.sized(structs.SampleOut, num_samples=4, tokens=tokens.ctypes.data)
        model.run(scheduler.plan_struct, scheduler.layout, block.ctypes.data, out)
        scheduler.commit(2, tokens.ctypes.data, 1)
        scheduler.plan(3, block.ctypes.data)  # a generated token: prompts have other kernels
        for _ in range(_STEPS):  # the same step again and again: nothing in it depends on the last
            before = model.stats()["expert_ns"]
            model.run(scheduler.plan_struct, scheduler.layout, block.ctypes.data, out)
            seconds.append((model.stats()["expert_ns"] - before) / 1e9 / _LAYERS)
    model.close()
    del tensors  # borrowed until here
    return seconds


def _call_seconds(pool: Pool, hidden: int) -> list[float]:
    """Seconds of a call for one layer, averaged over as many calls as a step has."""
    experts = ExpertSet(pool, 4, _TOP_K)
    tensors = _experts(hidden)
    experts.add_layer(*(t.native() for t in tensors))
    experts.finish()
    x, out = np.ones((1, hidden), np.float32), np.empty((1, hidden), np.float32)
    ids = np.arange(_TOP_K, dtype=np.int32)
    weights = np.full(_TOP_K, 1 / _TOP_K, np.float32)
    addresses = [a.ctypes.data for a in (x, ids, weights, out)]
    call, handle = load().kt_expert_set_run, experts.handle
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        for _ in range(_LAYERS):
            check(call(handle, 0, 1, *addresses, None))
        seconds.append((time.perf_counter() - start) / _LAYERS)
    experts.close()
    return seconds


def measure(pool: Pool, output: ResultFile) -> list[str]:
    """One line for each size and way of running; all runs go to the result file.

    The small layer is nothing but fixed cost; the other has real activations and many small bands.
    """
    lines = []
    for hidden in (64, 2048):
        num_bytes = sum(t.num_bytes for t in _experts(hidden))
        for label, run in (("in a program", _program_seconds), ("called", _call_seconds)):
            seconds = run(pool, hidden)
            output.append(
                "kernel.fixed",
                {
                    "label": label,
                    "bytes": num_bytes,
                    "pool": pool.describe(),
                    "seconds": seconds,
                },
            )
            lines.append(
                f"expert layer of {num_bytes / 1e3:,.0f} kB in the caches, {label}: best "
                f"{stats.number(1e6 * min(seconds))} us, median "
                f"{stats.number(1e6 * stats.median(seconds))} us"
            )
    return lines
