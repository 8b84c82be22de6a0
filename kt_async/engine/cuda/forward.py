"""One forward of part of a step, to the sampled ids: what eager steps and captured graphs share."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from kt_async.engine.cuda.args import SampleSharesArg
from kt_async.engine.cuda.block import SAMPLE_DTYPE, Block
from kt_async.engine.cuda.ops import CudaOps, RoutedExperts
from kt_async.engine.cuda.values import Attend, StepTensors
from kt_async.engine.runner import StepResult
from kt_async.ffi import structs
from kt_async.model import LAYERWISE, run_to_end
from kt_async.model.spec import ModelSpec

_SAMPLE_THREADS = 1024
_SAMPLE_BLOCKS = 16  # of one row, as in sample.cu


@dataclass(frozen=True, slots=True)
class Part:
    """Rows, tokens and samples of a step that run together: [first, end) of each."""

    rows: tuple[int, int]
    tokens: tuple[int, int]
    samples: tuple[int, int]
    is_decode: bool


def prompt_part(plan: structs.Plan, num_decode: int) -> Part:
    """The rows of a plan after its decode rows."""
    rows, tokens, samples = (
        (num_decode, end) for end in (plan.num_rows, plan.num_tokens, plan.num_samples)
    )
    return Part(rows, tokens, samples, is_decode=False)


class Forward:
    """Runs the model's forward on the current stream and samples into `out`. [engine]

    out: int32 on the device, host_out its pinned twin: a single copy brings all results back.
    result: typed views of host_out.
    """

    def __init__(self, ops: CudaOps, spec: ModelSpec, block: Block, sample_vocab: int) -> None:
        self._ops, self._spec, self._block, self._sample_vocab = ops, spec, block, sample_vocab
        self._forward = LAYERWISE[spec.architecture]
        capacity, top = block.layout.max_samples, structs.KT_MAX_LOGPROBS
        self.work = torch.empty((capacity, spec.vocab_size), dtype=torch.float32, device="cuda")
        # Per row: the blocks' largest logits and where they are, and how many blocks are done.
        self._shares = torch.zeros(
            capacity * (2 * _SAMPLE_BLOCKS + 1), dtype=torch.int32, device="cuda"
        )
        num_words = capacity * (2 + 2 * top)
        self.out = torch.zeros(num_words, dtype=torch.int32, device="cuda")
        self.host_out = torch.zeros(num_words, dtype=torch.int32, pin_memory=True)
        words = self.host_out.numpy()
        self.result = StepResult(
            tokens=words[:capacity],
            logprobs=words[capacity : 2 * capacity].view(np.float32),
            top_ids=words[2 * capacity : (2 + top) * capacity].reshape(capacity, top),
            top_logprobs=words[(2 + top) * capacity :].view(np.float32).reshape(capacity, top),
        )

    def step(self, part: Part, attend: Attend | None) -> StepTensors:
        """The device's view of a part; attend None: the ops' decode attention."""
        b = self._block
        words = SAMPLE_DTYPE.itemsize // 4
        at = SAMPLE_DTYPE.fields["token_index"][1] // 4  # type: ignore[index]
        first, end = part.samples
        params = b.device[b.layout.samples :].view(torch.int32)[: end * words].view(end, words)
        begin, stop = part.tokens
        return StepTensors(
            tokens=b.ints("tokens", stop)[begin:],
            positions=b.ints("positions", stop)[begin:],
            kv_slot=b.ints("kv_slot", stop)[begin:],
            logit_tokens=params[first:, at].long() - begin,
            sampled=self.out,
            attend=attend,
            is_decode=part.is_decode,
        )

    def run(self, step: StepTensors, part: Part, experts: RoutedExperts) -> torch.Tensor:
        """Logits f32 [S, V] of the part's samples, which are being sampled."""
        return run_to_end(self.layers(step, part, experts))

    def layers(
        self, step: StepTensors, part: Part, experts: RoutedExperts
    ) -> Generator[None, None, torch.Tensor]:
        """The same with a pause after every layer, during which the ops are left alone."""
        self._ops.step = step
        self._ops.experts_backend = experts
        value = yield from self._forward(self._ops, self._spec)
        logits: torch.Tensor = value.f32
        self._sample(logits, *part.samples)
        return logits

    def _sample(self, logits: torch.Tensor, first: int, end: int) -> None:
        """Sample logit rows [first, end) of the step, whose logits begin with `logits`."""
        b, top = self._block, structs.KT_MAX_LOGPROBS
        capacity = b.layout.max_samples
        out = self.out.data_ptr() + 4 * first
        lists = ("bias_ids", "bias_values", "history_ids", "history_counts")
        shares, size = self._shares.data_ptr(), 4 * capacity * _SAMPLE_BLOCKS
        pointers = [
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_void_p(self.work.data_ptr()),
            ctypes.c_int32(self._spec.vocab_size),
            ctypes.c_int32(self._sample_vocab),
            ctypes.c_void_p(b.address("samples") + first * SAMPLE_DTYPE.itemsize),
            *(ctypes.c_void_p(b.address(name)) for name in lists),
            SampleSharesArg(shares, shares + size, shares + 2 * size),
            ctypes.c_void_p(out),
            ctypes.c_void_p(out + 4 * capacity),
            ctypes.c_void_p(out + 8 * capacity + 4 * (top - 1) * first),
            ctypes.c_void_p(out + 4 * (2 + top) * capacity + 4 * (top - 1) * first),
        ]
        self._ops.launch("sample", (_SAMPLE_BLOCKS, end - first), pointers, _SAMPLE_THREADS)

    def start_read_back(self) -> None:
        """Put the copy of all results to the host onto the current stream."""
        self.host_out.copy_(self.out, non_blocking=True)

    def read_back(self) -> None:
        """Copy all results to the host and wait for them."""
        self.start_read_back()
        torch.cuda.current_stream().synchronize()
