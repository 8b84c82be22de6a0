"""The scheduler handle: one native call per method, no policy.

submit, cancel, wake and stats may be called from any thread; everything else belongs to the engine
thread. Ownership: the native side copies what it is given, the arrays returned by drain() belong to
this object and are overwritten by the next drain().
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from kt_async.ffi import lib, structs

if TYPE_CHECKING:
    from kt_async.engine.types import GenerationRequest

EVENT_DTYPE = np.dtype(structs.Event)
SAMPLE_DTYPE = np.dtype(structs.SampleParams)

_STAT_NAMES = [field[0] for field in structs.SchedStats._fields_ if field[0] != "struct_size"]


def _int32(values: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """An array is taken as it is; a list of 32k ids costs 0.8 ms, a third less than np.asarray."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, np.int32)
    return np.fromiter(values, np.int32, len(values))


class Scheduler:
    """Owns a kt_sched. Use close() or a with statement to free it."""

    def __init__(self, config: structs.SchedConfig) -> None:
        """config: see kt_sched_config. Raises NativeError naming the field that is out of range."""
        self._lib = lib.load()
        self._handle = ctypes.c_void_p()
        lib.check(self._lib.kt_sched_create(ctypes.byref(config), ctypes.byref(self._handle)))
        self.max_len: int = config.max_len
        self.max_queue: int = config.max_queue
        self.page_size: int = config.page_size
        self.layout = structs.sized(structs.BlockLayout)
        lib.check(self._lib.kt_sched_layout(self._handle, ctypes.byref(self.layout)))
        self.plan_struct = structs.sized(structs.Plan)
        self._plan_ref = ctypes.byref(self.plan_struct)
        self.lane_struct = structs.sized(structs.Plan)
        self._lane_ref = ctypes.byref(self.lane_struct)
        self.has_lane: bool = config.lane_tokens > 0
        # One step's worth: every logit row and every living sequence can give an event.
        capacity = config.max_samples + 2 * config.max_batch_size + config.max_queue + 64
        self._events = np.zeros(capacity, EVENT_DTYPE)
        self._events_address = self._events.ctypes.data
        self._num_events = ctypes.c_int32()
        self._num_events_ref = ctypes.byref(self._num_events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the handle; later calls raise NativeError. No other thread may be inside a call."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        lib.check(self._lib.kt_sched_destroy(handle))

    def submit(self, seq_id: int, request: GenerationRequest, now_ns: int) -> bool:
        """Queue a request; False when the queue is full. [any]

        Raises NativeError (KT_ERR_ARGUMENT) when it can never fit or a field is out of range.
        """
        prompt = _int32(request.prompt_ids)
        stop_ids = _int32(request.stop_ids)
        sampling = request.sampling
        bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int32)
        bias_values = np.fromiter(sampling.logit_bias.values(), np.float32)
        room = self.max_len - len(prompt)
        max_tokens = max(1, room) if request.max_tokens is None else request.max_tokens
        native = structs.sized(
            structs.Request,
            num_tokens=len(prompt),
            tokens=prompt.ctypes.data,
            seq_id=seq_id,
            seed=sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
            cache_salt=request.cache_salt & 0xFFFF_FFFF_FFFF_FFFF,
            max_tokens=min(max_tokens, 0x7FFF_FFFF),
            min_tokens=min(request.min_tokens, 0x7FFF_FFFF),
            priority=request.priority,
            num_stop_ids=len(stop_ids),
            stop_ids=stop_ids.ctypes.data,
            bias_ids=bias_ids.ctypes.data,
            bias_values=bias_values.ctypes.data,
            num_bias=len(bias_ids),
            top_k=sampling.top_k,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            num_logprobs=sampling.num_logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
        )
        status = self._lib.kt_sched_submit(self._handle, ctypes.byref(native), now_ns)
        return lib.check(status) == structs.KT_OK

    def cancel(self, seq_id: int) -> None:
        """End a sequence at the next plan; unknown ids are ignored. [any]"""
        lib.check(self._lib.kt_sched_cancel(self._handle, seq_id))

    def wait(self, timeout_ns: int) -> int:
        """Sleep without the GIL until there is work: KT_OK, KT_IDLE (woken) or KT_TIMEOUT."""
        return lib.check(self._lib.kt_sched_wait(self._handle, timeout_ns))

    def wake(self) -> None:
        """Make wait() return. [any]"""
        lib.check(self._lib.kt_sched_wake(self._handle))

    def plan(self, now_ns: int, block_address: int) -> bool:
        """Write the next step into the block and `plan_struct`; False when nothing can run."""
        status = self._lib.kt_sched_plan(self._handle, now_ns, block_address, self._plan_ref)
        return lib.check(status) == structs.KT_OK

    def commit(self, now_ns: int, tokens_address: int, num_samples: int) -> None:
        """Give the sampled ids (int32 [num_samples]) of the oldest planned step back."""
        lib.check(self._lib.kt_sched_commit(self._handle, now_ns, tokens_address, num_samples))

    def fail(self, now_ns: int) -> None:
        """End the sequences of the oldest planned step with KT_FINISH_ERROR."""
        lib.check(self._lib.kt_sched_fail(self._handle, now_ns))

    def plan_lane(self, now_ns: int, block_address: int) -> bool:
        """Write the next step of the prefill lane into the block and `lane_struct`, or False."""
        status = self._lib.kt_sched_plan_lane(self._handle, now_ns, block_address, self._lane_ref)
        return lib.check(status) == structs.KT_OK

    def commit_lane(self, now_ns: int, tokens_address: int, num_samples: int) -> None:
        """Give the sampled ids of the lane step back."""
        lib.check(self._lib.kt_sched_commit_lane(self._handle, now_ns, tokens_address, num_samples))

    def fail_lane(self, now_ns: int) -> None:
        """End the sequences of the lane step with KT_FINISH_ERROR."""
        lib.check(self._lib.kt_sched_fail_lane(self._handle, now_ns))

    def drain(self) -> npt.NDArray[np.void]:
        """Events since the last drain, oldest first, EVENT_DTYPE [N]; valid until the next one."""
        status = self._lib.kt_sched_drain(
            self._handle, self._events_address, len(self._events), self._num_events_ref
        )
        lib.check(status)
        return self._events[: self._num_events.value]

    def stats(self) -> dict[str, int]:
        """Counters and gauges of kt_sched_stats. [any]"""
        stats = structs.sized(structs.SchedStats)
        lib.check(self._lib.kt_sched_query(self._handle, ctypes.byref(stats)))
        return {name: getattr(stats, name) for name in _STAT_NAMES}

    def journal(self) -> bytes:
        """The next piece (at most 1 MiB) of the call record; empty when there is no more. [any]

        Needs KT_SCHED_JOURNAL. Format: native/src/sched/journal.h.
        """
        text = ctypes.create_string_buffer(1 << 20)
        count = ctypes.c_int64()
        lib.check(self._lib.kt_sched_journal(self._handle, text, len(text), ctypes.byref(count)))
        return text.raw[: count.value]

    def check(self) -> None:
        """Verify every native invariant; raises NativeError naming the broken one. For tests."""
        lib.check(self._lib.kt_sched_check(self._handle))
