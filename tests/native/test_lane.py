"""The engine loop drives a prefill lane beside its decode steps; lane and runner compute nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from kt_async.engine.loop import Delivery, EngineLoop
from kt_async.engine.runner import Lane, StepResult, aligned_block, sample_arrays
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

PIECES = 5
LANE_TOKEN, STEP_TOKEN = 7000, 1


class FakeLane:
    """A step takes PIECES calls of advance; every logit row of it samples LANE_TOKEN."""

    def __init__(self, capacity: int) -> None:
        self.result: StepResult = sample_arrays(capacity)[0]
        self.result.tokens[:] = LANE_TOKEN
        self.result.logprobs[:] = -7.0
        self.calls: list[str] = []
        self.is_held = False  # a step does not end meanwhile
        self._left = 0

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_block(num_bytes)

    def start(self, plan: structs.Plan, layout: object, block: object) -> None:
        assert self._left == 0
        self.calls.append(f"start {plan.num_tokens}")
        self._left = PIECES

    def advance(self, *, alone: bool) -> None:
        self.calls.append("alone" if alone else "beside")
        self._left -= 1

    def is_complete(self) -> bool:
        return self._left <= 0 and not self.is_held


class FakeRunner:
    """Every logit row samples STEP_TOKEN."""

    def __init__(self, capacity: int) -> None:
        self.result: StepResult = sample_arrays(capacity)[0]
        self.result.tokens[:] = STEP_TOKEN
        self.result.logprobs[:] = -1.0
        self.lane: Lane | None = FakeLane(capacity)

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_block(num_bytes)

    def run(self, plan: structs.Plan, layout: object, block: object) -> None:
        del layout, block
        assert isinstance(self.lane, FakeLane)
        self.lane.calls.append(f"step {plan.num_tokens}")

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Engine:
    """A loop over fakes, and what it has delivered."""

    def __init__(self) -> None:
        config = structs.sized(
            structs.SchedConfig,
            max_batch_size=4,
            chunk_size=32,
            page_size=4,
            num_pages=500,
            max_len=1000,
            max_queue=8,
            max_samples=40,
            watermark_pages=-1,
            lane_tokens=16,
        )
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner(40)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.finish: dict[int, int] = {}
        self.failures: list[str] = []
        self.changed = threading.Condition()
        self.loop = EngineLoop(self.scheduler, self.runner, self.deliver)
        self.loop.start()

    def deliver(self, delivery: Delivery) -> None:
        with self.changed:
            for seq_id, kind, finish, token, _, row, *_ in delivery.events.tolist():
                if kind == structs.KT_EVENT_TOKEN:
                    self.tokens[seq_id].append(token)
                    if delivery.result is not None:
                        self.logprobs[seq_id].append(float(delivery.result.logprobs[row]))
                elif kind == structs.KT_EVENT_FINISH:
                    self.finish[seq_id] = finish
            if delivery.failure:
                self.failures.append(delivery.failure)
            self.changed.notify_all()

    def submit(self, seq_id: int, length: int, max_tokens: int, **sampling: int) -> None:
        request = GenerationRequest(
            "r", [seq_id] * length, max_tokens, SamplingParams(temperature=0.0, **sampling)
        )
        assert self.scheduler.submit(seq_id, request, 0)

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10)

    @property
    def calls(self) -> list[str]:
        assert isinstance(self.runner.lane, FakeLane)
        return self.runner.lane.calls


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.loop.stop()
    engine.scheduler.close()


def test_decode_steps_run_between_the_pieces_of_a_prompt(engine: Engine) -> None:
    engine.submit(1, 5, 900)
    engine.until(lambda: len(engine.tokens[1]) > 3)
    engine.submit(2, 64, 1, num_logprobs=0)
    engine.until(lambda: 2 in engine.finish)
    assert engine.tokens[2] == [LANE_TOKEN]
    assert engine.logprobs[2] == [-7.0]
    assert set(engine.tokens[1]) == {STEP_TOKEN}
    begin = engine.calls.index("start 32")
    chunk = ["beside", "step 1"] * PIECES
    assert engine.calls[begin : begin + 22] == [*["start 32", *chunk] * 2]
    engine.scheduler.cancel(1)
    engine.until(lambda: 1 in engine.finish)


def test_a_prompt_goes_on_alone_when_nobody_decodes_any_more(engine: Engine) -> None:
    engine.submit(1, 5, 900)
    engine.until(lambda: len(engine.tokens[1]) > 3)
    assert isinstance(engine.runner.lane, FakeLane)
    engine.runner.lane.is_held = True
    engine.submit(2, 20, 1)
    engine.until(lambda: "start 20" in engine.calls)
    engine.scheduler.cancel(1)
    engine.until(lambda: 1 in engine.finish)
    engine.runner.lane.is_held = False
    engine.until(lambda: 2 in engine.finish)
    assert engine.tokens[2] == [LANE_TOKEN]
    assert "alone" in engine.calls
    engine.submit(3, 64, 2)  # alone: ordinary steps
    engine.until(lambda: 3 in engine.finish)
    assert engine.tokens[3] == [STEP_TOKEN] * 2
    engine.scheduler.check()


def test_a_cancelled_prompt_ends_with_its_lane_step(engine: Engine) -> None:
    engine.submit(1, 5, 900)
    engine.until(lambda: len(engine.tokens[1]) > 3)
    assert isinstance(engine.runner.lane, FakeLane)
    engine.runner.lane.is_held = True
    engine.submit(2, 64, 5)
    engine.until(lambda: "start 32" in engine.calls)
    engine.scheduler.cancel(2)
    seen = len(engine.tokens[1])
    engine.until(lambda: len(engine.tokens[1]) > seen + 2)
    assert 2 not in engine.finish
    engine.runner.lane.is_held = False
    engine.until(lambda: 2 in engine.finish)
    assert engine.finish[2] == structs.KT_FINISH_CANCELLED
    assert engine.tokens[2] == []
    assert engine.calls.count("start 32") == 1
    seen = len(engine.tokens[1])
    engine.until(lambda: len(engine.tokens[1]) > seen)


def test_a_lane_that_breaks_is_fatal(engine: Engine) -> None:
    def broken(*, alone: bool) -> None:
        raise ZeroDivisionError("x")

    engine.runner.lane.advance = broken  # type: ignore[union-attr, method-assign]
    engine.submit(1, 5, 900)
    engine.until(lambda: len(engine.tokens[1]) > 3)
    engine.submit(2, 64, 5)
    engine.until(lambda: engine.failures == ["x"])


def test_a_log_that_keeps_a_failure_keeps_no_lane(caplog: pytest.LogCaptureFixture) -> None:
    """Everything that the engine has in a GPU's memory hangs on its lane."""
    engine = Engine()
    old = weakref.ref(engine.runner.lane)

    def broken(*args: object) -> None:
        try:
            raise RuntimeError("the cause")
        except RuntimeError as error:
            raise NativeError(structs.KT_ERR_INTERNAL, "x") from error

    engine.runner.run = broken  # type: ignore[method-assign]
    engine.submit(1, 5, 3)
    engine.until(lambda: bool(engine.failures))
    engine.loop.stop()
    engine.scheduler.close()
    del engine.runner
    gc.collect()
    assert old() is None
    assert [record.exc_info for record in caplog.records]
