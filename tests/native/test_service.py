"""The engine service and its thread over the real scheduler, with a runner that computes nothing."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from kt_async.engine.restart import watch
from kt_async.engine.runner import Lane, StepResult, aligned_block, sample_arrays
from kt_async.engine.service import EngineService, LiveGeneration
from kt_async.engine.types import EngineInfo, GenerationRequest, SamplingParams, StepOutput
from kt_async.errors import EngineStuckError, NativeError, RequestError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

MAX_QUEUE = 3


class FakeRunner:
    """Samples 100, 101, 102, ... over all steps; `fault` and `gate` let a test break or hold it."""

    def __init__(self, capacity: int) -> None:
        self.result: StepResult = sample_arrays(capacity)[0]
        self.lane: Lane | None = None
        self.result.logprobs[:] = -0.5
        self.result.top_ids[:] = np.arange(structs.KT_MAX_LOGPROBS)
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.is_closed = False
        self._next = 100

    def make_block(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_block(num_bytes)

    def run(self, plan: structs.Plan, layout: structs.BlockLayout, block: object) -> None:
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        self.steps += 1
        count = plan.num_samples
        self.result.tokens[:count] = range(self._next, self._next + count)
        self._next += count

    def stats(self) -> dict[str, float]:
        return {"steps": self.steps}

    def close(self) -> None:
        self.is_closed = True


def make_scheduler() -> Scheduler:
    """One row, small pages."""
    return Scheduler(
        structs.sized(
            structs.SchedConfig,
            max_batch_size=1,
            chunk_size=16,
            page_size=4,
            num_pages=64,
            max_len=64,
            max_queue=MAX_QUEUE,
            max_samples=33,
            watermark_pages=-1,
        )
    )


class Engine:
    """A started service and its fake runner."""

    def __init__(self) -> None:
        scheduler = make_scheduler()
        self.runner = FakeRunner(scheduler.layout.max_samples)
        self.service = EngineService(scheduler, self.runner, EngineInfo("fake", "none", 64, 512, 0))
        self.service.start()

    def submit(self, prompt: int = 5, max_tokens: int = 4, **sampling: int) -> LiveGeneration:
        request = GenerationRequest("r", range(prompt), max_tokens, SamplingParams(**sampling))
        return self.service.submit(request)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    yield engine
    engine.runner.gate.set()
    await asyncio.to_thread(engine.service.close)
    assert engine.runner.is_closed


async def outputs(generation: LiveGeneration) -> list[StepOutput]:
    return [output async for output in generation]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing to wait for: another thread changes it
            await asyncio.sleep(0.001)


async def test_every_token_once_and_in_order(engine: Engine) -> None:
    parts = await outputs(engine.submit(max_tokens=6))
    assert [token for part in parts for token in part.tokens] == list(range(100, 106))
    assert [part.finish_reason for part in parts][-1] == "length"
    assert all(part.finish_reason is None for part in parts[:-1])
    assert engine.service.running() == []


async def test_steps_nobody_has_read_are_merged(engine: Engine) -> None:
    generation = engine.submit(max_tokens=6)
    await until(lambda: not engine.service.running())
    (only,) = await outputs(generation)
    assert list(only.tokens) == list(range(100, 106))
    assert only.finish_reason == "length"
    assert only.queue_s > 0


async def test_log_probabilities_follow_their_tokens(engine: Engine) -> None:
    parts = await outputs(engine.submit(prompt=4, max_tokens=2, num_logprobs=2, prompt_logprobs=1))
    chosen = [entry for part in parts for entry in part.logprobs]
    assert [entry.token for entry in chosen] == [token for part in parts for token in part.tokens]
    assert all(entry.logprob == -0.5 and len(entry.top) == 2 for entry in chosen)
    prompt = [entry for part in parts for entry in part.prompt_logprobs]
    assert prompt[0] is None
    assert [entry.token for entry in prompt if entry] == [1, 2, 3]


async def test_cancel_ends_a_running_and_a_waiting_request(engine: Engine) -> None:
    engine.runner.gate.clear()
    running, waiting = engine.submit(max_tokens=50), engine.submit()
    running.cancel()
    waiting.cancel()
    engine.runner.gate.set()
    assert (await outputs(running))[-1].finish_reason == "cancelled"
    assert (await outputs(waiting))[-1].finish_reason == "cancelled"
    assert engine.service.running() == []


async def test_full_queue_is_429(engine: Engine) -> None:
    engine.runner.gate.clear()
    first = engine.submit()
    await until(lambda: engine.service.stats()["num_waiting"] == 0)
    waiting = [engine.submit() for _ in range(MAX_QUEUE)]
    with pytest.raises(RequestError, match=rf"queue is full \({MAX_QUEUE} requests") as refused:
        engine.submit()
    assert refused.value.status == 429
    assert 1 <= (refused.value.retry_after or 0) <= 60
    assert len(engine.service.running()) == 1 + MAX_QUEUE
    engine.runner.gate.set()
    for generation in (first, *waiting):
        assert (await outputs(generation))[-1].finish_reason == "length"


async def test_what_can_never_fit_is_400(engine: Engine) -> None:
    with pytest.raises(RequestError) as refused:
        engine.submit(prompt=64)
    assert refused.value.status == 400
    assert engine.service.running() == []


async def test_failed_step_ends_its_requests_only(engine: Engine) -> None:
    engine.runner.fault = NativeError(structs.KT_ERR_UNSUPPORTED, "no such row")
    (only,) = await outputs(engine.submit())
    assert (only.finish_reason, only.error) == ("error", "no such row")
    engine.runner.fault = None
    assert (await outputs(engine.submit()))[-1].finish_reason == "length"
    assert engine.service.healthy


@pytest.mark.parametrize(
    "fault", [NativeError(structs.KT_ERR_INTERNAL, "x"), ZeroDivisionError("x")]
)
async def test_broken_engine_tells_everybody(engine: Engine, fault: Exception) -> None:
    engine.runner.gate.clear()
    generations = [engine.submit() for _ in range(3)]
    engine.runner.fault = fault
    engine.runner.gate.set()
    for generation in generations:
        last = (await outputs(generation))[-1]
        assert (last.finish_reason, last.error) == ("error", "x")
    assert not engine.service.healthy
    assert engine.service.failure == "x"
    with pytest.raises(RequestError, match="the engine has failed: x") as refused:
        engine.submit()
    assert refused.value.status == 503


def no_load() -> tuple[Scheduler, FakeRunner]:
    raise AssertionError("nothing is to be loaded here")


async def test_an_engine_that_hangs_fails_everybody() -> None:
    engine = Engine()
    loop, scheduler = engine.service._engine, engine.service._scheduler
    assert loop is not None
    engine.runner.gate.clear()
    generation = engine.submit()
    with pytest.raises(EngineStuckError, match=r"a step has not ended after 0\.05 s"):
        await watch(engine.service, "restart", no_load, step_limit_s=0.05, check_s=0.01)
    assert "not ended" in str((await outputs(generation))[-1].error)
    assert not engine.service.healthy
    assert engine.service.stats()["num_running"] == 1
    engine.service.close()  # must not wait for the thread
    engine.runner.gate.set()
    await asyncio.to_thread(loop.stop)
    assert scheduler is not None
    scheduler.close()


async def test_a_restart_keeps_nothing_of_the_old_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU has no room for two models; caplog keeps the traceback, as a debugger would."""
    engine = Engine()
    old = weakref.ref(engine.runner)

    def broken(*args: object) -> None:
        raise NativeError(structs.KT_ERR_INTERNAL, "x")

    engine.runner.run = broken  # type: ignore[method-assign]
    assert (await outputs(engine.submit()))[-1].finish_reason == "error"
    service = engine.service
    del engine
    alive_at_load: list[bool] = []

    def load() -> tuple[Scheduler, FakeRunner]:
        alive_at_load.append(old() is not None)
        scheduler = make_scheduler()
        return scheduler, FakeRunner(scheduler.layout.max_samples)

    await service.restart(load)
    assert alive_at_load == [False]
    assert service.healthy
    request = GenerationRequest("r", range(5), 4, SamplingParams())
    assert (await outputs(service.submit(request)))[-1].finish_reason == "length"
    await asyncio.to_thread(service.close)
    assert caplog.records


async def test_an_idle_engine_does_not_hang(engine: Engine) -> None:
    watching = watch(engine.service, "exit", no_load, step_limit_s=0.01, check_s=0.005)
    guard = asyncio.create_task(watching)
    await asyncio.sleep(0.05)
    assert (await outputs(engine.submit()))[-1].finish_reason == "length"
    assert engine.service.healthy
    guard.cancel()


async def test_stats_name_their_source(engine: Engine) -> None:
    await outputs(engine.submit())
    stats = engine.service.stats()
    assert stats["runner_steps"] == engine.runner.steps > 0
    assert stats["engine_host_ns"] > 0
