"""The engine thread: wait, plan, run and sample, commit, deliver.

It owns the runner and the step block; scheduler.submit and cancel are the only things other threads
call. A step leaves Python in four native calls (plan, run, commit, drain); its results reach the
event loop in one delivery. Nothing here knows asyncio: `deliver` is a plain callable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kt_async.engine.runner import Runner, StepResult
from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The events of one step, copied out of the engine's arrays.

    result is None when no event of the step carries log-probabilities. failure: why the step's
    sequences ended with KT_FINISH_ERROR; is_fatal: the engine thread ends with this delivery.
    """

    events: npt.NDArray[np.void]
    result: StepResult | None = None
    failure: str | None = None
    is_fatal: bool = False


class EngineLoop:
    """Runs steps until stop() or a broken engine."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, deliver: Callable[[Delivery], None]
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._block = runner.make_block(scheduler.layout.num_bytes)
        self._samples = _sample_view(scheduler.layout, self._block)
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="kt-engine", daemon=True)
        self.host_ns = 0  # time outside the runner in steps that ran, for /metrics
        self.steps = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current step and wait for the thread. [any but engine]"""
        self._stopping = True
        self._scheduler.wake()
        self._thread.join()

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._scheduler.wait(-1)
                if not self._stopping:
                    self._turn()
        except Exception as error:  # the engine's one boundary: nobody above could report it
            log.exception("the engine stopped")
            no_events = np.empty(0, np.dtype(structs.Event))
            self._deliver(Delivery(no_events, failure=str(error), is_fatal=True))

    def _turn(self) -> None:
        """One step, if there is anything to run, and the delivery of its events."""
        scheduler = self._scheduler
        begin = time.monotonic_ns()
        failure: str | None = None
        run_ns = 0
        if scheduler.plan(begin, self._block.ctypes.data):
            before = time.monotonic_ns()
            failure = self._run()
            after = time.monotonic_ns()
            run_ns = after - before
            if failure is None:
                tokens = self._runner.result.tokens
                scheduler.commit(after, tokens.ctypes.data, scheduler.plan_struct.num_samples)
            else:
                scheduler.fail(after)
            self.steps += 1
        events = scheduler.drain()
        if len(events):
            self._deliver(Delivery(events.copy(), self._logprobs(), failure))
        if run_ns:
            self.host_ns += time.monotonic_ns() - begin - run_ns

    def _run(self) -> str | None:
        """Run the planned step; a failure that leaves the engine usable is returned."""
        scheduler = self._scheduler
        try:
            self._runner.run(scheduler.plan_struct, scheduler.layout, self._block)
        except NativeError as error:
            if error.status == structs.KT_ERR_INTERNAL:
                raise
            log.error("step %d failed: %s", scheduler.plan_struct.step_id, error)
            return str(error)
        return None

    def _logprobs(self) -> StepResult | None:
        """Copies of the step's log-probabilities if any of its rows asked for them."""
        count = self._scheduler.plan_struct.num_samples
        wanted = self._samples["num_logprobs"][:count]
        if not (wanted >= 0).any():
            return None
        result = self._runner.result
        return StepResult(
            result.tokens[:count].copy(),
            result.logprobs[:count].copy(),
            result.top_ids[:count].copy(),
            result.top_logprobs[:count].copy(),
        )


def _sample_view(layout: structs.BlockLayout, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    dtype = np.dtype(structs.SampleParams)
    start = layout.samples
    return block[start : start + layout.max_samples * dtype.itemsize].view(dtype)
