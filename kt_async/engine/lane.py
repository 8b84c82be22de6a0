"""The prefill lane as the engine thread drives it: plan, queue piece by piece, commit.

A lane step is in flight over several turns of the engine loop. The scheduler decides what runs
there (kt_sched_plan_lane); the runner's lane decides how much of it to queue before each decode
step.
"""

from __future__ import annotations

import time

from kt_async.engine.runner import Lane, StepResult, sample_view
from kt_async.ffi.scheduler import Scheduler


class LaneLoop:
    """One lane of one engine. [engine]"""

    def __init__(self, scheduler: Scheduler, lane: Lane) -> None:
        self._scheduler, self._lane = scheduler, lane
        self._block = lane.make_block(scheduler.layout.num_bytes)
        self.samples = sample_view(scheduler.layout, self._block)
        self._in_flight = False

    @property
    def result(self) -> StepResult:
        """Of the step that was committed last."""
        return self._lane.result

    @property
    def num_samples(self) -> int:
        """Logit rows of that step."""
        return int(self._scheduler.lane_struct.num_samples)

    def plan(self, now_ns: int) -> None:
        """Begin a step, unless one is in flight or nothing waits for the lane."""
        scheduler = self._scheduler
        if not self._in_flight and scheduler.plan_lane(now_ns, self._block.ctypes.data):
            self._lane.start(scheduler.lane_struct, scheduler.layout, self._block)
            self._in_flight = True

    def advance(self, *, alone: bool) -> None:
        """Queue more of the step in flight; alone: no decode step follows, so wait for a piece."""
        if self._in_flight:
            self._lane.advance(alone=alone)

    def commit(self) -> bool:
        """Give a step that has run to its end back to the scheduler; False if there is none."""
        if not self._in_flight or not self._lane.is_complete():
            return False
        self._in_flight = False
        tokens = self._lane.result.tokens
        self._scheduler.commit_lane(time.monotonic_ns(), tokens.ctypes.data, self.num_samples)
        return True
