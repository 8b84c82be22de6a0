"""Runners execute one planned step and sample; the CPU runner is one native call.

A runner belongs to the engine thread. Its result arrays are reused by the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kt_async.engine.cpu_program import ProgramRecorder, assign_buffers
from kt_async.ffi import structs
from kt_async.ffi.model import CpuModel
from kt_async.ffi.pool import Pool
from kt_async.model import FORWARDS
from kt_async.model.spec import ModelSpec
from kt_async.weights.loader import load_weights
from kt_async.weights.source import ModelFiles

_PAGE = 4096


@dataclass(slots=True)
class StepResult:
    """What sampling gave, one entry per logit row; valid until the next step."""

    tokens: npt.NDArray[np.int32]  # [S]
    logprobs: npt.NDArray[np.float32]  # [S]
    top_ids: npt.NDArray[np.int32]  # [S, 20]
    top_logprobs: npt.NDArray[np.float32]  # [S, 20]


class Lane(Protocol):
    """Executes prompt steps piece by piece beside the runner's decode steps. [engine]"""

    @property
    def result(self) -> StepResult:
        """Valid while is_complete()."""

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory for the lane's step block."""

    def start(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        """Begin a step; plan and block stay as they are until it is complete."""

    def advance(self, *, alone: bool) -> None:
        """Queue what may run beside the next decode step; alone: there is none, so wait a little."""

    def is_complete(self) -> bool:
        """Whether the step has run to its end; result is then valid until the next start."""


class Runner(Protocol):
    """Executes steps. [engine]"""

    result: StepResult

    @property
    def lane(self) -> Lane | None:
        """None: every step runs alone."""

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory for the scheduler's step block, where this runner wants to read it."""

    def run(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        """Run and sample; raises NativeError."""

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None: ...


def sample_view(layout: structs.BlockLayout, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """The block's sampling parameters, one entry per logit row."""
    dtype = np.dtype(structs.SampleParams)
    start = layout.samples
    return block[start : start + layout.max_samples * dtype.itemsize].view(dtype)


def sample_arrays(capacity: int) -> tuple[StepResult, structs.SampleOut]:
    """Result arrays for `capacity` logit rows and the native struct that points at them."""
    top = structs.KT_MAX_LOGPROBS
    result = StepResult(
        tokens=np.zeros(capacity, np.int32),
        logprobs=np.zeros(capacity, np.float32),
        top_ids=np.zeros((capacity, top), np.int32),
        top_logprobs=np.zeros((capacity, top), np.float32),
    )
    out = structs.sized(
        structs.SampleOut,
        num_samples=capacity,
        tokens=result.tokens.ctypes.data,
        logprobs=result.logprobs.ctypes.data,
        top_ids=result.top_ids.ctypes.data,
        top_logprobs=result.top_logprobs.ctypes.data,
    )
    return result, out


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """Capacities of the native program."""

    max_tokens: int
    max_rows: int
    max_samples: int
    page_size: int
    num_pages: int
    kv_type: int  # KT_KV_x
    sample_vocab: int


def aligned_block(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed, page-aligned memory for the step's metadata."""
    raw = np.zeros(num_bytes + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + num_bytes]


class CpuRunner:
    """Runs steps on the CPU through a recorded native program."""

    lane: Lane | None = None

    def __init__(
        self,
        files: ModelFiles,
        spec: ModelSpec,
        pool: Pool,
        limits: CpuLimits,
        *,
        show_progress: bool | None = None,
    ) -> None:
        self._pool = pool
        self._files = files  # the embedding table stays mapped
        recorder = ProgramRecorder(files)
        logits = FORWARDS[spec.architecture](recorder, spec)
        self._model = CpuModel(
            pool,
            structs.sized(
                structs.ModelConfig,
                max_tokens=limits.max_tokens,
                max_rows=limits.max_rows,
                max_logit_rows=limits.max_samples,
                page_size=limits.page_size,
                num_pages=limits.num_pages,
                kv_type=limits.kv_type,
                vocab_size=logits.width,
                sample_vocab=limits.sample_vocab,
            ),
        )
        assign_buffers(recorder.operations, logits, self._model.add_buffer)
        weights = load_weights(
            self._model,
            files,
            recorder.weight_uses(),
            recorder.constants,
            show_progress=show_progress,
        )
        for op in recorder.operations:
            self._model.add_op(
                op.code,
                inputs=[-1 if v is None else v.buffer for v in op.inputs],
                outputs=[op.out.buffer],
                weights=[-1 if use is None else weights[use] for use in op.weights],
                ints=op.ints,
                floats=op.floats,
            )
        self.logits_buffer: int = logits.buffer
        self._model.finish(logits.buffer)
        self.result, self._out = sample_arrays(limits.max_samples)

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_block(num_bytes)

    def run(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        self._model.run(plan, layout, block.ctypes.data, self._out)

    def read_logits(self, count: int) -> npt.NDArray[np.float32]:
        """Logits [count, V] of the step just run (tests and evaluation)."""
        return self._model.read(self.logits_buffer, 0, count)

    def stats(self) -> dict[str, float]:
        return self._model.stats()

    def close(self) -> None:
        self._model.close()
        self._pool.close()
