"""The engine thread: wait, plan, run and sample, commit, deliver.

It owns the runner and the step block; scheduler.submit and cancel are the only things other threads
call. A step leaves Python in four native calls (plan, run, commit, drain); its results reach the
event loop in one delivery. Nothing here knows asyncio: `deliver` is a plain callable.

Where scheduler and runner have a prefill lane, a long prompt runs there beside the decode steps:
each turn queues as much of it as the lane thinks fit, then runs a decode step.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kt_async.engine.lane import LaneLoop
from kt_async.engine.runner import Runner, StepResult, sample_view
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
        self._samples = sample_view(scheduler.layout, self._block)
        self._lane: LaneLoop | None = None
        if scheduler.has_lane:
            assert runner.lane is not None, "a scheduler with a lane over a runner without one"
            self._lane = LaneLoop(scheduler, runner.lane)
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="kt-engine", daemon=True)
        self.host_ns = 0  # time outside the runner in steps that ran, for /metrics
        self.steps = 0
        self.busy_since_ns = 0  # begin of the turn in progress, 0 = waiting for work

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current step, wait for the thread, let go of the model. [any but engine]"""
        self._stopping = True
        self._scheduler.wake()
        self._thread.join()
        # A traceback of the failure may keep this object: the thread's own frame is never emptied.
        del self._scheduler, self._runner, self._lane, self._block, self._samples

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._scheduler.wait(-1)
                if not self._stopping:
                    self.busy_since_ns = time.monotonic_ns()
                    self._turn()
                    self.busy_since_ns = 0
        except Exception as error:  # the engine's one boundary: nobody above could report it
            log.exception("the engine stopped")
            forget_frames(error)
            no_events = np.empty(0, np.dtype(structs.Event))
            self._deliver(Delivery(no_events, failure=str(error), is_fatal=True))

    def _turn(self) -> None:
        """One step, if there is anything to run, and the delivery of its events."""
        scheduler, lane = self._scheduler, self._lane
        begin = time.monotonic_ns()
        failure: str | None = None
        run_ns = 0
        if lane is not None and scheduler.plan_struct.lane_waits:
            lane.plan(begin)
        planned = scheduler.plan(begin, self._block.ctypes.data)
        before = time.monotonic_ns()
        if lane is not None:
            lane.advance(alone=not planned)
        if planned:
            failure = self._run()
            after = time.monotonic_ns()
            run_ns = after - before
            if failure is None:
                tokens = self._runner.result.tokens
                scheduler.commit(after, tokens.ctypes.data, scheduler.plan_struct.num_samples)
            else:
                scheduler.fail(after)
            self.steps += 1
        count = scheduler.plan_struct.num_samples
        self._drain(self._samples[:count], self._runner.result, failure)
        if lane is not None and lane.commit():
            self._drain(lane.samples[: lane.num_samples], lane.result, None)
            lane.plan(time.monotonic_ns())  # the next part of a prompt follows at once
            self.steps += 1
        if run_ns:
            self.host_ns += time.monotonic_ns() - begin - run_ns

    def _drain(
        self, samples: npt.NDArray[np.void], result: StepResult, failure: str | None
    ) -> None:
        """Deliver the events of a step."""
        events = self._scheduler.drain()
        if len(events):
            self._deliver(Delivery(events.copy(), _logprobs(samples, result), failure))

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


def forget_frames(error: BaseException | None) -> None:
    """Empty the frames of a failure and of its causes.

    Whoever keeps the traceback (a log, a debugger) would keep the model's memory with it.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _logprobs(samples: npt.NDArray[np.void], result: StepResult) -> StepResult | None:
    """Copies of the step's log-probabilities if any of its logit rows asked for them."""
    count = len(samples)
    if not (samples["num_logprobs"] >= 0).any():
        return None
    return StepResult(
        result.tokens[:count].copy(),
        result.logprobs[:count].copy(),
        result.top_ids[:count].copy(),
        result.top_logprobs[:count].copy(),
    )
